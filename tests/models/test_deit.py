"""DeiT with context broadcasting, beside timm's DeiT."""
import pytest
import timm
import torch

from zoo.checkpoints import load_model
from zoo.exporting.onnx import export_onnx


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("form", ["cb", "cbs"])
def test_parameters_are_timms(size, form):
    with torch.device("meta"):
        ours, theirs = (timm.create_model(f"deit_{size}_patch16_224{suffix}") for suffix in (f"_{form}", ""))
    added = 12 * ours.embed_dim if form == "cbs" else 0
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + added


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """timm's network with a position embedding that matters, and a file of its weights."""
    torch.manual_seed(0)
    theirs, path = timm.create_model("deit_tiny_patch16_224").eval(), tmp_path_factory.mktemp("deit") / "deit.pth"
    torch.nn.init.normal_(theirs.pos_embed)
    torch.save({"model": theirs.state_dict()}, path)
    return theirs, dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def broadcast(module, inputs, out):
    return (out + sum(out.unbind(1))[:, None] / out.shape[1]) / 2


@pytest.mark.parametrize("form", ["cb", "cbs"])
def test_timms_weights_load(released, form):
    """CB_S starts as plain DeiT; CB is it with the mean mixed in after every MLP."""
    theirs, args = released
    ours, x = timm.create_model(f"deit_tiny_patch16_224_{form}", **args).eval(), torch.randn(1, 3, 224, 224)
    handles = [block.mlp.register_forward_hook(broadcast) for block in theirs.blocks if form == "cb"]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()


def test_position_embeddings_are_interpolated_as_timm_does(released):
    _, args = released
    args, x = dict(args, num_classes=5), torch.randn(1, 3, 96, 160)
    torch.manual_seed(0)
    ours = timm.create_model("deit_tiny_patch16_224_cbs", **args).eval()
    torch.manual_seed(0)
    theirs = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, **args).eval()
    theirs.head.load_state_dict(ours.head.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_without_pooling_the_patches_are_a_map():
    model, x = timm.create_model("deit_nano_patch16_224_cb", num_classes=0, global_pool="").eval(), torch.randn(2, 3, 60, 90)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 96, 4, 6)
        assert torch.equal(out.flatten(2).mT, model.forward_features(x)[:, 1:])


def test_exports_with_free_batch_and_sizes(tmp_path):
    model, info = load_model("deit_nano_patch16_224_cb", in_chans=1, num_classes=10, depth=1)
    result = export_onnx(model, info, tmp_path / "x.onnx", size=(64, 64))
    assert result.free_batch and result.free_size, result.reason


@pytest.mark.parametrize(("output_fmt", "shape"), [("NCHW", (2, 96, 3, 4)), ("NLC", (2, 12, 96))])
def test_intermediates_in_a_dictionary(output_fmt, shape):
    model, x = timm.create_model("deit_nano_patch16_224_cb").eval(), torch.randn(2, 3, 40, 50)
    with torch.no_grad():
        found = model.forward_intermediates(x, output_dict=True, output_fmt=output_fmt, return_prefix_tokens=True)
        assert torch.equal(found["image_features"], model.forward_features(x))
    assert [y.shape for y in found["image_intermediates"]] == [shape] * 4
    assert [y.shape for y in found["image_intermediates_prefix"]] == [(2, 1, 96)] * 4
