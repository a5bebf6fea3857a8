import re
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.errors import InputError
from zoo.models.das import DASMobileNet, DASResNet, GatedBlock, checkpoint_filter_fn

ORIGIN = {name: name.removeprefix("das_") for name in zoo.list_models("das_*") if "nano" not in name}


def random_state(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for name, v in model.state_dict().items()}


@pytest.mark.parametrize("name", ORIGIN)
def test_timms_weights_load_into_everything_but_the_gates(name, tmp_path):
    state = random_state(timm.create_model(ORIGIN[name]))
    torch.save(state, tmp_path / "timm.pth")
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "timm.pth")))
    loaded = model.state_dict()
    gates = {key for key in loaded if ".das." in key}
    plain = {key.replace(".block.", "."): value for key, value in loaded.items() if key not in gates}
    assert plain.keys() == state.keys() and all(torch.equal(plain[key], state[key]) for key in state)
    gate = next(module for module in model.modules() if isinstance(module, GatedBlock)).das
    assert not gate.offset.weight.any() and gate.pointwise.weight.any()


def test_weights_that_lack_anything_else_do_not_load(tmp_path):
    overlay = dict(file=str(tmp_path / "w.pth"))
    for state, lost in ((timm.create_model("resnet18").state_dict(), "layer2.1.bn1.weight"),
                        (timm.create_model("das_resnet18").state_dict(), "layer2.1.das.norm.weight")):
        del state[lost]
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(InputError, match=r" do not, such as \S+ \(missing\)"):
            timm.create_model("das_resnet18", pretrained=True, pretrained_cfg_overlay=overlay)


def test_our_own_names_pass_the_filter_unchanged():
    model = timm.create_model("das_resnet_nano")
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model).keys() == state.keys()


@pytest.mark.parametrize("name", ["das_resnet18", "das_mobilenetv2_100"])
def test_gates_that_are_open_leave_timms_network(name):
    """The blocks are timm's, in timm's order, at every place where gates can be put."""
    theirs = timm.create_model(ORIGIN[name]).eval()
    x = torch.randn(2, 3, 64, 64)
    for gates in ("stage", "block"):
        ours = timm.create_model(name, gates=gates).eval()
        ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
        for module in ours.modules():
            if isinstance(module, GatedBlock):
                torch.nn.init.zeros_(module.das.norm.weight)
                torch.nn.init.constant_(module.das.norm.bias, 50.0)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("name", "gates", "number"), [
    ("das_resnet18", "stage", 4), ("das_resnet18", "block", 8), ("das_mobilenetv2_100", "stage", 5), ("das_mobilenetv2_100", "block", 17),
])
def test_places_of_the_gates(name, gates, number):
    model = timm.create_model(name, gates=gates, das_args=dict(ratio=0.4))
    found = [module for module in model.modules() if isinstance(module, GatedBlock)]
    assert len(found) == number and all(gate.das.hidden_dim > 0.3 * gate.das.dim for gate in found)


# Millions of parameters and billions of multiply-adds at 224, ours: recorded so that no change goes unseen.
SIZES = {
    "das_resnet18": (11.82, 1.85), "das_resnet34": (21.93, 3.70), "das_resnet50": (26.87, 4.34), "das_resnet101": (45.86, 8.06),
    "das_mobilenetv2_100": (3.56, 0.326), "das_resnet_nano": (0.670, 0.311),
}


@pytest.mark.parametrize("name", zoo.list_models("das_*"))
def test_size(name):
    model = timm.create_model(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    params, macs = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=2e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=2e-3)


@pytest.mark.parametrize("model", [DASResNet, DASMobileNet])
def test_bad_arguments_are_named(model):
    name = "das_resnet_nano" if model is DASResNet else "das_mobilenetv2_100"
    with pytest.raises(ValueError, match="gates must be one of stage, block, got 'stages'"):
        timm.create_model(name, gates="stages")


def test_counts_of_the_page():
    """Parameters with grouped and with dense deformable convolutions."""
    page = (Path(__file__).parents[2] / "docs" / "das.md").read_text()
    rows = re.findall(r"^\| `(das_\w+)` \| ([\d.]+) M \| ([\d.]+) M \(\+([\d.]+) %\), .* \| ([\d.]+) M \(\+([\d.]+) %\),", page, re.M)
    assert {name for name, *_ in rows} == set(ORIGIN)
    for name, plain, *gated in rows:
        with torch.device("meta"):
            models = [timm.create_model(ORIGIN[name]), *(timm.create_model(name, das_args=dict(group_width=width)) for width in (16, None))]
        counts = [sum(p.numel() for p in model.parameters()) for model in models]
        assert plain == f"{counts[0] / 1e6:.2f}"
        assert gated == [text for n in counts[1:] for text in (f"{n / 1e6:.2f}", f"{100 * (n / counts[0] - 1):.1f}")]
