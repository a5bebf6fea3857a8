"""Networks that give pictures, A2N and HAN, as citizens of timm as far as that goes, and their layers."""
import io

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.layers import AttentionInAttention, ChannelSpatialAttention, LayerAttention

MODELS = [name for name in zoo.list_models() if zoo.mechanism_of(name) in ("a2n", "holistic")]
LIGHT = ["a2n_nano_x2", "han_nano_x2"]
SMALL = dict(a2n=dict(dim=8, depth=2, up_dim=6), han=dict(dim=8, groups=2, depth=1, reduction=4))
light = pytest.mark.parametrize("name", LIGHT)


def make(name: str, **args) -> nn.Module:
    """With branches that do not start at zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("gamma"):
                parameter.fill_(0.7)
    return model


def images(size=(19, 22), batch=2, channels=3) -> torch.Tensor:
    return 255 * torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name):
    model = make(name, **SMALL[name.split("_")[0]]).train()
    scale = int(name[-1])
    out = model(images((9, 7)))
    assert out.shape == (2, 3, scale * 9, scale * 7) and model.scale == scale and out.isfinite().all()
    out.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not without, f"parameters without a finite gradient: {without}"
    assert zoo.models.is_dense(name) and model.task == "restoration"


@light
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (33, 40)], ids=str)
def test_any_size_and_layout(name, size):
    model, x = make(name), images(size, batch=1)
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (1, 3, 2 * size[0], 2 * size[1])
        strided = images((size[0], 2 * size[1]), batch=1)[..., ::2].copy_(x)
        for same in (x.contiguous(memory_format=torch.channels_last), strided, x.mT.contiguous().mT):
            torch.testing.assert_close(model(same), expected, atol=1e-3, rtol=1e-5)


@light
def test_a_picture_does_not_depend_on_its_batch(name):
    model, x = make(name), images(batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-3, rtol=1e-5)


@light
@pytest.mark.parametrize("channels", [1, 4])
def test_channels(name, channels):
    with torch.no_grad():
        assert make(name, in_chans=channels)(images(channels=channels)).shape == (2, channels, 38, 44)


def test_what_a_new_network_adds_to_is_the_picture():
    """A2N enlarges bilinearly, HAN gives back the mean colour."""
    x = images()
    a2n, han = make("a2n_nano_x2"), make("han_nano_x2")
    with torch.no_grad():
        for model in (a2n, han):
            nn.init.zeros_(model.head.weight)
            nn.init.zeros_(model.head.bias)
        torch.testing.assert_close(a2n(x), nn.functional.interpolate(x, scale_factor=2, mode="bilinear"))
        mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040])[:, None, None]
        torch.testing.assert_close(han(x), mean.expand(2, 3, 38, 44))
    assert not any("mean" in path for path, _ in han.named_parameters())


@light
def test_precisions(name):
    model, x = make(name), images((24, 32))
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert (out - expected).abs().max() < 0.02 * 255
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.no_grad():
            out = make(name).to(dtype)(x.to(dtype))
        assert out.dtype == dtype and (out.float() - expected).abs().max() < 0.03 * 255


@light
def test_memory_formats_give_the_same(name):
    model, x = make(name), images()
    own = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().mean(), own)
    model = model.to(memory_format=torch.channels_last)
    grads = torch.autograd.grad(model(x.contiguous(memory_format=torch.channels_last)).square().mean(), own)
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm().clamp(min=1e-3)


@light
def test_gradient_checkpointing_changes_nothing(name):
    grads = []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        model(images()).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


@light
def test_compiles_whole(name):
    model, x = make(name), images()
    expected = model(x)
    wanted = torch.autograd.grad(expected.sum(), model.stem.parameters())
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), model.stem.parameters()), wanted, atol=1e-2, rtol=1e-3)


@light
def test_exports_and_loads(name):
    model = make(name)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = images(batch=3)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x), atol=1e-3, rtol=1e-5)


@light
def test_groups_cover_every_parameter(name):
    model = make(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())
    groups = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.8)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    assert len({g["lr_scale"] for g in groups}) > 3


@light
def test_state_survives_saving(name, tmp_path):
    model = make(name)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    overlay = dict(file=str(tmp_path / "w.pth"))
    same = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert torch.equal(model(images()), same(images()))
    with pytest.raises(InputError, match=r"\(1, .*\) is needed"):
        timm.create_model(name, pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay)


@light
@pytest.mark.parametrize(("args", "message"), [
    (dict(num_classes=10), "num_classes must be 0, as the answer is a picture, got 10"),
    (dict(scale=5), "scale must be one of 2, 3, 4.*, got 5"), (dict(in_chans=0), "in_chans must be at least 1, got 0"),
    (dict(dim=8, reduction=0), "reduction"),
])
def test_wrong_arguments(name, args, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **args)


@light
def test_wrong_input_and_no_features(name):
    for shape in ((2, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got shape"):
            make(name)(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="features_only is not implemented"):
        timm.create_model(name, features_only=True)


LAYERS = dict(AttentionInAttention=AttentionInAttention, ChannelSpatialAttention=ChannelSpatialAttention)


@pytest.mark.parametrize("mechanism", ["a2n", "holistic"])
def test_attached_layers_start_as_nothing(mechanism):
    torch.manual_seed(0)
    model, x = timm.create_model("resnet10t").eval(), torch.randn(2, 3, 64, 48)
    expected = model(x)
    zoo.attach(model, mechanism)
    assert torch.equal(model(x), expected)
    kind = zoo.models.MECHANISMS[mechanism].ATTACHABLE
    assert any(isinstance(module, kind) for module in model.modules())
    zoo.attach(model, "holistic", keep_outputs=False)  # whose own γ is zero
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_layers_in_other_precisions(kind, dtype):
    torch.manual_seed(0)
    layer, x = LAYERS[kind](6), torch.randn(2, 6, 7, 5)
    expected, out = layer(x), layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_channel_spatial_attention_is_the_convolution_in_three_dimensions():
    torch.manual_seed(0)
    layer, x = ChannelSpatialAttention(6), torch.randn(2, 6, 7, 5)
    nn.init.constant_(layer.gamma, 0.3)
    gate = nn.functional.conv3d(x[:, None], layer.conv.weight[None], layer.conv.bias, padding=1)[:, 0].sigmoid()
    torch.testing.assert_close(layer(x), x + 0.3 * x * gate)
    with zoo.capture(layer) as maps:
        layer(x)
    torch.testing.assert_close(maps[""]["gate"], gate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_attention_is_in_float32_whatever_the_dtype(dtype):
    """At these sizes the logits are beyond float16, and their differences below bfloat16."""
    torch.manual_seed(0)
    layer, x = LayerAttention(), torch.randn(1, 5, 64, 40, 40).to(dtype)
    nn.init.ones_(layer.gamma)
    with zoo.capture(layer) as maps:
        expected = layer.double()(x.double())
        wanted = maps[""]["attention"]
        out = layer.to(dtype)(x)
    assert out.dtype == dtype and maps[""]["attention"].dtype == torch.float32
    torch.testing.assert_close(maps[""]["attention"], wanted.float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out.double(), expected, atol=0.05, rtol=0.02)
    with torch.autocast("cpu", dtype), zoo.capture(layer.float()) as maps:
        torch.testing.assert_close(layer(x.float()).double(), expected, atol=1e-3, rtol=1e-3)
    assert maps[""]["attention"].dtype == torch.float32


def test_layer_attention_chooses_the_layer_least_alike():
    layer = LayerAttention()
    nn.init.ones_(layer.gamma)
    x = torch.eye(3)[:, :, None, None].mul(9)[None] - torch.tensor([0.0, 0.0, 1.0])[:, None, None]
    with zoo.capture(layer) as maps:
        layer(x)
    energy = x[0].flatten(1) @ x[0].flatten(1).T
    assert torch.equal(maps[""]["attention"][0].argmax(1), energy.argmin(1))


@pytest.mark.parametrize("layer", [LayerAttention(), ChannelSpatialAttention(4)])
def test_layers_refuse_other_dimensions(layer):
    with pytest.raises(ValueError, match=rf"{type(layer).__name__}: x must be \(B, .*, got shape \(2, 4, 5\)"):
        layer(torch.zeros(2, 4, 5))


@pytest.mark.parametrize(("args", "message"), [
    (dict(dim=0), "dim and reduction must be at least 1, got 0 and 4"), (dict(dim=8, temperature=0), "temperature must be above 0, got 0"),
    (dict(dim=8, plain_kernel=2), "plain_kernel must be odd, got 2")])
def test_wrong_arguments_of_attention_in_attention(args, message):
    with pytest.raises(ValueError, match=message):
        AttentionInAttention(**args)


def test_the_two_branches_are_reported():
    torch.manual_seed(0)
    layer, x = AttentionInAttention(8), torch.randn(2, 8, 5, 6)
    with zoo.capture(layer) as maps:
        layer(x)
    assert maps[""]["weights"].shape == (2, 2) and torch.allclose(maps[""]["weights"].sum(1), torch.ones(2))
    assert maps["attention"]["gate"].shape == x.shape
