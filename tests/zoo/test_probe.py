"""Heads on frozen networks: where their tokens come from, that nothing else learns, and that the whole is an ordinary module."""
import copy

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.exporting.onnx import export_onnx
from zoo.probe import POOLINGS

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def vit(**args):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT, **args)
    for parameter in model.parameters():  # so that norms do something
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def _mapped_with_class_token() -> nn.Module:
    """A class token that is not among what `forward_features` hands over, as in networks of several stages."""
    model = timm.create_model("test_resnet")
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
    return model


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("args", "prefix"), [({}, 1), (dict(reg_tokens=3), 4), (dict(class_token=False, global_pool="avg"), 0)])
def test_patch_tokens_of_vision_transformers(args, prefix):
    model = vit(**args).eval()
    tokens = zoo.probe(model, 5, 4).tokens(IMAGES)
    assert tokens.shape == (3, 16, 32)
    torch.testing.assert_close(tokens, model.forward_features(IMAGES)[:, prefix:])


def test_tokens_before_the_last_norm_and_with_the_class_token():
    model = vit(reg_tokens=2).eval()
    state = copy.deepcopy(model.state_dict())
    (patches, others), = model.forward_intermediates(IMAGES, indices=1, norm=False, output_fmt="NLC", intermediates_only=True,
                                                     return_prefix_tokens=True)
    before = zoo.probe(model, 5, 4, norm=False, class_token=True).tokens(IMAGES)
    torch.testing.assert_close(before, torch.cat([others[:, :1], patches], 1))
    after = zoo.probe(model, 5, 4, class_token=True).tokens(IMAGES)
    torch.testing.assert_close(after, model.norm(before))
    assert not torch.allclose(after, before, atol=0.1)
    alone = zoo.probe(model, 5, pooling="class", norm=False).tokens(IMAGES)
    torch.testing.assert_close(alone, others[:, :1])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())  # the network itself keeps its norm


def test_networks_that_norm_what_is_pooled_have_no_norm_of_tokens():
    model = vit(global_pool="avg", fc_norm=True).eval()
    torch.testing.assert_close(zoo.probe(model, 5, 4, norm=False).tokens(IMAGES), model.forward_features(IMAGES)[:, 1:])


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout", "swin_tiny_patch4_window7_224", "biformer_nano",
                                  "deit_nano_patch16_224_cb", "litv2_nano"])
def test_maps_and_tokens_of_other_networks_and_ours(name):
    """One vector for every position, in reading order, whether a network lays out channels first or last."""
    small = dict(img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1)) if name.startswith("swin") else {}
    model = timm.create_model(name, **small).eval()
    probe, image = zoo.probe(model, 3, pooling="linear").eval(), torch.randn(2, 3, 64, 64)
    image = torch.randn(2, 3, 224, 224) if name.startswith("deit") else image
    maps, = model.forward_intermediates(image, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
    torch.testing.assert_close(probe.tokens(image).mT, maps.flatten(2), rtol=1e-4, atol=1e-4)
    assert probe(image).shape == (2, 3)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_head_learns(pooling):
    model = zoo.probe(vit(drop_path_rate=0.5, proj_drop_rate=0.5), 5, 8, pooling=pooling).train()
    assert model.head.training and not any(module.training for module in model.backbone.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    assert not model.tokens(IMAGES).requires_grad
    model(IMAGES).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"head"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} <= changed
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_images_that_require_gradients_get_them():
    image = IMAGES.clone().requires_grad_()
    zoo.probe(vit(), 5, 8).eval()(image)[:, 0].sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_ordinary_module(pooling, tmp_path):
    model = zoo.probe(vit(), 5, 8, pooling=pooling).train()
    model(IMAGES)
    model.eval()
    expected = model(IMAGES)
    torch.save(model.state_dict(), tmp_path / "probe.pt")
    torch.manual_seed(7)
    again = zoo.probe(timm.create_model("vit_tiny_patch16_224", **VIT), 5, 8, pooling=pooling).eval()
    assert not torch.allclose(again(IMAGES), expected)
    again.load_state_dict(torch.load(tmp_path / "probe.pt"))
    for same in (again, copy.deepcopy(model), torch.compile(model, fullgraph=True, backend="eager")):
        torch.testing.assert_close(same(IMAGES), expected)
    with zoo.capture(model) as maps:
        model(IMAGES)
    pools = {"attentive": 8, "simpool": 1}
    assert ("head.0" in maps) == (pooling in pools)
    if pooling in pools:
        assert maps["head.0"]["attention"].shape == (3, pools[pooling], 16)


@pytest.mark.parametrize(("name", "pooling"), [("vit", "attentive"), ("vit", "simpool"), ("test_resnet", "attentive")])
def test_exports_to_onnx(name, pooling, tmp_path):
    model = zoo.probe(vit() if name == "vit" else timm.create_model(name), 5, 8, pooling=pooling).eval()
    config = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0, crop_mode="center")
    exported = export_onnx(model, ModelInfo(name, (), config), tmp_path / "probe.onnx")
    assert exported.free_batch and exported.worst < 1e-4
    assert exported.free_size == (name == "test_resnet"), exported.reason  # of this ViT PyTorch takes one size


def test_wrong_arguments():
    model = vit()
    for args, message in (
            (dict(pooling="atentive"), "pooling must be one of attentive, .*, got 'atentive'; did you mean attentive"),
            (dict(queries=5), r"num_queries must divide dim / d_out .* of tokens 32 wide, queries can be 1, 2, 4, 8, 16, 32"),
            (dict(queries=8, d_out=5), "of tokens 32 wide, queries can be none"),
            (dict(classes=0), "classes must be at least 1, got 0")):
        with pytest.raises(InputError, match=message):
            zoo.probe(model, **{"classes": 3, **args})
    for other, args, message in (
            (nn.Linear(3, 3), {}, "Linear has no forward_features"),
            (timm.create_model("test_resnet"), dict(pooling="class"), "ResNet has no class token"),
            (_mapped_with_class_token(), dict(pooling="class"), "ResNet has no class token"),
            (_mapped_with_class_token(), dict(class_token=True), "ResNet has no class token"),
            (timm.create_model("test_resnet"), dict(norm=False), "ResNet has no norm called `norm`"),
            (timm.create_model("coat_tiny", img_size=64), {}, "CoaT.forward_features gives list, neither tokens"),
            (timm.create_model("pit_ti_224"), {}, "hands over no patch tokens, only 1")):
        with pytest.raises(InputError, match=message):
            zoo.probe(other, 3, **args)
    with pytest.raises(InputError, match="there is no model 'vit_tinny_patch16_224'; did you mean vit_tiny_patch16_224"):
        zoo.probe("vit_tinny_patch16_224", 3)
    with pytest.raises(InputError, match="no weights of biformer_nano can be had"):
        zoo.probe("biformer_nano", 3)
