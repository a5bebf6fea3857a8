"""timm's networks and weights under the attention."""
from functools import partial

import pytest
import timm
import torch
from timm.models.hrnet import cfg_cls
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from zoo.errors import InputError
from zoo.layers import PolarizedSelfAttention
from zoo.models.polarized import PolarizedHRNet, checkpoint_filter_fn
from zoo.weights import load_weights

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
    with pytest.raises(InputError, match=r" do not, such as \S+ \(missing\)"):
        timm.create_model("polarized_resnet50_p", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "timm.pth")))


@pytest.mark.parametrize(("name", "kind", "count"), [("polarized_resnet50_s", Bottleneck, 16), ("polarized_hrnet_w18_p", BasicBlock, 104)])
def test_the_attention_follows_the_first_convolution_of_three(name, kind, count):
    blocks = [m for m in timm.create_model(name).modules() if isinstance(getattr(m, "aa", None), PolarizedSelfAttention)]
    assert len(blocks) == count and all(type(block) is kind for block in blocks)
    for block in blocks:
        conv = block.conv1 if kind is BasicBlock else block.conv2
        assert conv.kernel_size == (3, 3) and block.aa.dim == conv.out_channels


def test_weights_of_the_authors_segmentation_network():
    """Their HRNet with OCR, saved by DataParallel: `deattn` for the attention, heads beside the backbone."""
    build = partial(PolarizedHRNet, cfg_cls["hrnet_w18_small"], layout="sequential", head="")
    trained, model = build(), build(fuse="bilinear")
    theirs = dict(channel_query="conv_q_right", channel_value="conv_v_right", channel_up="conv_up", spatial_query="conv_q_left",
                  spatial_value="conv_v_left", aa="deattn")
    state = {"module.backbone." + ".".join(theirs.get(part, part) for part in name.split(".")): value
             for name, value in trained.state_dict().items()}
    state = {"state_dict": state | {"module.ocr.cls_head.weight": torch.zeros(19, 512, 1, 1)}}
    load_weights(model, state, filter_fn=checkpoint_filter_fn)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.state_dict().items())
    with pytest.raises(ValueError, match="trained with fuse=\"bilinear\", got 'nearest'"):
        load_weights(trained, state, filter_fn=checkpoint_filter_fn)


def test_unknown_interpolation():
    with pytest.raises(ValueError, match="fuse must be one of nearest, bilinear, got 'bicubic'"):
        PolarizedHRNet(cfg_cls["hrnet_w18_small"], fuse="bicubic")
