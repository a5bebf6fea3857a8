"""timm's networks and weights under the attention."""
import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from zoo.layers import PolarizedSelfAttention

PAIRS = {
    "polarized_resnet50_p": "resnet50", "polarized_resnet50_s": "resnet50",
    "polarized_hrnet_w18_s": "hrnet_w18",
}


def timms(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.ndim == 1:
                value.uniform_(0.2, 0.4)  # no norm is left as it begins
    return model


@pytest.mark.parametrize("name", PAIRS)
def test_weights_of_timm_load_into_all_but_the_attention(name, tmp_path):
    plain = timms(PAIRS[name])
    torch.save(plain.state_dict(), tmp_path / "timm.pth")
    overlay = dict(file=str(tmp_path / "timm.pth"))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert {key.split(".aa.")[0] for key in state.keys() - plain.state_dict().keys()} == {
        key for key, module in model.named_modules() if isinstance(getattr(module, "aa", None), PolarizedSelfAttention)}
    for module in model.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            module.aa = nn.Identity()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 96)
        outputs, expected = model.forward_intermediates(x), plain.forward_intermediates(x)
    for mine, their in zip([outputs[0], *outputs[1]], [expected[0], *expected[1]], strict=True):
        assert (mine - their).norm() <= 1e-5 * their.norm()


def test_incomplete_weights_are_refused(tmp_path):
    state = timms("resnet50").state_dict()
    del state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "timm.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("polarized_resnet50_p", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "timm.pth")))


@pytest.mark.parametrize(("name", "kind", "count"), [("polarized_resnet50_s", Bottleneck, 16), ("polarized_hrnet_w18_p", BasicBlock, 104)])
def test_the_attention_follows_the_first_convolution_of_three(name, kind, count):
    blocks = [m for m in timm.create_model(name).modules() if isinstance(getattr(m, "aa", None), PolarizedSelfAttention)]
    assert len(blocks) == count and all(type(block) is kind for block in blocks)
    for block in blocks:
        conv = block.conv1 if kind is BasicBlock else block.conv2
        assert conv.kernel_size == (3, 3) and block.aa.dim == conv.out_channels
