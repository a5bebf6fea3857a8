"""What is particular to AttNet: its cost, its parameters that do not decay, and its gated MLP in slices."""
import json
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.layers import ATConv
from zoo.models.attnet import GatedMlp

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"


@pytest.mark.parametrize("name", sorted(set(zoo.list_models("attnet_*")) - {"attnet_nano"}))
def test_multiplications_are_those_of_the_manifest_but_for_what_commutes(name):
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    with torch.device("meta"):
        model, images = timm.create_model(name).eval(), torch.empty(manifest["input"])
    saved = []

    def count(layer, inputs):
        """The definition projects all positions and pools for free; ours pools by a product and projects k² positions."""
        (_, c, h, w), runs = inputs[0].shape, layer.kernel_size**2
        saved.append(c * c * (h * w - runs) - c * h * w * runs)

    for layer in model.modules():
        if isinstance(layer, ATConv):
            layer.register_forward_pre_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    macs = counter.get_total_flops() / 2
    assert macs + sum(saved) == pytest.approx(manifest["macs"], rel=0.005)
    assert 0.9 * manifest["macs"] < macs < 0.98 * manifest["macs"]


def test_lateral_inhibition_does_not_decay():
    model = timm.create_model("attnet_nano")
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if "difference_control" in name} != set()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width, slices", [(1, 3), (20, 2), (40, 1), (64, 1)])
def test_slices_of_the_gated_mlp_sum_to_the_whole(width, slices, norm):
    torch.manual_seed(0)
    mlp, x = GatedMlp(24, 40, norm), torch.randn(2, 24, 5, 4)
    expected = mlp(x)  # with gradients, in one piece
    mlp.FEWEST, mlp.SLICE = width, 0  # no wider than this
    sliced = []
    gated = mlp._gated
    mlp._gated = lambda x, channels: sliced.append(channels) or gated(x, channels)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected.detach())
    assert len(sliced) == slices  # begins at multiples of 16


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_gated_mlp_calls_modules_that_are_hooked_or_replaced(norm, grad):
    torch.manual_seed(0)
    mlp, x, called = GatedMlp(6, 20, norm), torch.randn(2, 6, 5, 4), []
    with torch.set_grad_enabled(grad):
        expected = mlp(x)
        for name, module in mlp.named_children():
            hook = module.register_forward_hook(lambda *_, name=name: called.append(name))
            torch.testing.assert_close(mlp(x), expected)
            assert called.pop() == name and not called
            hook.remove()
        mlp.fc1 = torch.nn.Sequential(mlp.fc1, torch.nn.Tanh())
        assert not torch.allclose(mlp(x), expected)


def test_gated_mlp_in_float16_does_not_overflow():
    mlp, x = GatedMlp(8, 64, norm=True).half(), torch.randn(1, 8, 4, 4).half()
    with torch.no_grad():
        mlp.fc1.weight.mul_(100)
        out = mlp(x)
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), mlp.double()(x.double()), atol=0.01, rtol=0.01)
