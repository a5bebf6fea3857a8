"""The paper's sizes, and timm's network of the same name in the paper."""
import pytest
import timm
import torch
from torch import nn

from zoo.models import sknet

PAPER = {"sknet50": (27.5e6, 4.47e9), "sknet101": (48.9e6, 8.46e9)}  # table 2
PYTORCH = {"sk_resnet50": (26.15e6, 4147222784), "sk_resnet101": (45.68e6, 7921068288)}  # the authors' repository; the manifests


def multiply_adds(model: nn.Module) -> int:
    total = 0

    def count(module, args, output):
        nonlocal total
        total += output[0, 0].numel() * module.weight.numel() if isinstance(module, nn.Conv2d) else module.weight.numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 224, 224))
    return total


@pytest.mark.parametrize("name", PAPER | PYTORCH)
def test_sizes(name):
    params, macs = (PAPER | PYTORCH)[name]
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=0.005)
    assert multiply_adds(model) == pytest.approx(macs, rel=0.005)


def test_weights_of_timms_skresnext_give_its_outputs(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("skresnext50_32x4d").eval()
    with torch.no_grad():
        for value in theirs.state_dict().values():
            if value.ndim == 1:
                value.uniform_(0.4, 0.6)  # no norm is left as it begins
        torch.save(theirs.state_dict(), tmp_path / "timm.pth")
        ours = timm.create_model("sknet50", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "timm.pth"))).eval()
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
        expected = theirs.forward_intermediates(x, intermediates_only=True)
        for mine, their in zip(ours.forward_intermediates(x, intermediates_only=True), expected, strict=True):
            torch.testing.assert_close(mine, their, atol=1e-4, rtol=1e-4)


def test_names_of_ours_stay():
    model = timm.create_model("sknet_nano")
    assert list(sknet.checkpoint_filter_fn(model.state_dict(), model)) == list(model.state_dict())
