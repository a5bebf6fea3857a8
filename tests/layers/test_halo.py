import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn

import zoo
from zoo.layers import HaloAttention

WITH_TIMM = {
    "default": dict(dim=16, num_heads=2),
    "strided": dict(dim=16, num_heads=2, stride=2),
    "strided, odd block": dict(dim=16, num_heads=2, stride=2, block_size=7, halo_size=2),
    "wide values": dict(dim=8, dim_out=20, num_heads=4, dim_head=3, block_size=4, halo_size=1, qkv_bias=True),
    "narrow queries": dict(dim=24, num_heads=3, qk_ratio=0.33, block_size=2, halo_size=3),
}


@pytest.mark.parametrize("name", WITH_TIMM)
def test_values_and_gradients_are_those_of_timm(name):
    torch.manual_seed(0)
    theirs = HaloAttn(**WITH_TIMM[name]).double()
    ours = HaloAttention(**WITH_TIMM[name]).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, ours.dim, 2 * ours.block_size, 4 * ours.block_size, dtype=torch.float64, requires_grad=True)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    grads, expected = (torch.autograd.grad(y, [x, *m.parameters()], cotangent) for y, m in ((out, ours), (expected, theirs)))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [4, 5])
@pytest.mark.parametrize("size", [(7, 9), (3, 2), (1, 1)], ids=str)
def test_any_size(size, block, stride):
    layer = HaloAttention(8, 12, stride=stride, num_heads=2, block_size=block, halo_size=1)
    x = torch.randn(1, 8, *size, requires_grad=True)
    out = layer(x)
    assert out.shape == (1, 12, *(-(-n // stride) for n in size))
    out.square().sum().backward()
    assert all(g.isfinite().all() for g in (x.grad, *(p.grad for p in layer.parameters())))


def test_gradients_in_float64():
    layer = HaloAttention(4, num_heads=2, stride=2, block_size=2, halo_size=1).double()
    assert torch.autograd.gradcheck(layer, torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True), fast_mode=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_of_a_map_as_large_as_the_block_any_larger_block_makes_the_same(stride):
    """Blocks of other sizes differ in which rows of their tables stand for an offset, and in nothing else."""
    small, large = (HaloAttention(8, num_heads=2, stride=stride, block_size=block, halo_size=1) for block in (6, 8))
    state = small.state_dict()
    for name in ("pos_embed.height_rel", "pos_embed.width_rel"):
        table = torch.randn(19, 4)  # offset 0 in row 9
        state[name] = table[9 - 7 : 9 + 8]
        large.state_dict()[name].copy_(table)
    small.load_state_dict(state)
    large.q.load_state_dict(small.q.state_dict())
    large.kv.load_state_dict(small.kv.state_dict())
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(small(x), large(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_and_channels_last(dtype):
    torch.manual_seed(0)
    layer, x = HaloAttention(16, num_heads=2, block_size=4, halo_size=2), torch.randn(2, 16, 6, 9)
    expected = layer(x)
    out = layer(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last) and expected.is_contiguous()
    torch.testing.assert_close(out, expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and (out - expected).abs().max() < 0.1
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert (layer.to(dtype)(x.to(dtype)) - expected).abs().max() < 0.1


def test_compiles_whole():
    layer, x = HaloAttention(8, num_heads=2, block_size=4, halo_size=1), torch.randn(2, 8, 9, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_state_survives_saving(tmp_path):
    layer, other = (HaloAttention(8, num_heads=2, block_size=4, halo_size=1) for _ in range(2))
    torch.save(layer.state_dict(), tmp_path / "layer.pth")
    other.load_state_dict(torch.load(tmp_path / "layer.pth", weights_only=True))
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(layer(x), other(x))


def test_is_timms_halo_attention_in_timms_networks():
    theirs = timm.create_model("halonet26t", num_classes=3).eval()
    ours = timm.create_model("halonet26t", num_classes=3, self_attn_layer=HaloAttention).eval()
    assert any(isinstance(module, HaloAttention) for module in ours.modules())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
        assert ours(x[..., :100, :67]).shape == (1, 3)


def test_can_be_attached():
    model, x = timm.create_model("resnet10t").eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(zoo.attach(model, "halo", where="layer4")(x), before)


@pytest.mark.parametrize(("args", "message"), [
    (dict(num_heads=3), r"num_heads must divide dim_out \(8\), got 3"),
    (dict(block_size=0), "block_size must be at least 1 and halo_size at least 0, got 0 and 3"),
    (dict(stride=3), "stride must be 1 or 2, got 3"),
])
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        HaloAttention(**dict(dim=8) | args)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"HaloAttention: x must be \(B, 8, H, W\), got shape \(2, 16, 4, 4\)"):
        HaloAttention(8)(torch.zeros(2, 16, 4, 4))
