"""Which blocks are read how coarsely, and pyramid sparse attention in networks of long rows."""
import copy
import math

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from zoo.errors import InputError
from zoo.kernels import pyramid_sparse_attention
from zoo.layers import PyramidSparseAttention, gilbert_order, pyramid_levels, pyramid_sparse

GRID, BLOCKS = (12, 16), (32, 16)
EVERYTHING = (1.0, 1.0, 1.0, 1.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(count, heads=2, width=8, seed=0):
    """Queries, keys and values of a row; near ones are alike, and attention is far from uniform."""
    smooth = torch.randn(3, 2, heads, count + 8, width, generator=generator(seed)).cumsum(3)
    return (smooth[..., 8:, :] - smooth[..., :-8, :]).unbind(0)


@given(height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=60)
def test_the_curve_comes_to_every_place_once_and_never_jumps(height, width):
    order = gilbert_order(height, width)
    assert order.sort().values.tolist() == list(range(height * width))
    steps = torch.stack((order // width, order % width)).diff().abs()
    assert (steps <= 1).all() and (steps.sum(0) == 2).sum() <= (height % 2 or width % 2)


def test_blocks_of_the_curve_are_compact():
    """128 tokens of 64×64 lie within squares of about 16; row by row they are 64 wide."""
    order = gilbert_order(64, 64).unflatten(0, (-1, 128))
    spread = [(axis.amax(1) - axis.amin(1)).max() for axis in (order // 64, order % 64)]
    assert max(spread) < 20


def test_shares_of_the_blocks_are_kept():
    q, k, _ = tokens(20 * 16)
    levels = pyramid_levels(q, k, (32, 16), generator=generator())
    assert levels.shape == (2, 2, 10, 20) and levels.dtype == torch.int32
    for level, count in zip((1, 2, 4, 8, 0), (1, 2, 2, 5, 10), strict=True):  # 5, 15, 25 and 50 % of 20
        assert ((levels == level).sum(-1) == count).all()
    assert (pyramid_levels(q, k, (32, 16), shares=EVERYTHING) == 1).all()
    few = pyramid_levels(q, k, (32, 16), shares=(0.1, 0.15, 0.15, 0.35))  # the authors' README
    assert [int((few[0, 0, 0] == level).sum()) for level in (1, 2, 4, 8, 0)] == [2, 1, 0, 4, 13]


def test_thresholds_bound_what_is_left_out():
    q, k, _ = tokens(20 * 16)
    shares = (0.4, 0.5, 0.6, 0.8)
    levels = pyramid_levels(q, k, (32, 16), "thresholdbound", generator=generator())
    places = [pyramid_sparse._places(size, draw) for draw in [generator()] for size in (32, 16)]
    energy = pyramid_sparse._energy(q, k, *places, (32, 16), 8**-0.5)
    energy = energy / energy.sum(-1, keepdim=True)
    for last, share in zip((1, 2, 4, 8), shares, strict=True):
        read = ((levels > 0) & (levels <= last)) * energy
        total, least = read.sum(-1), read.masked_fill(read == 0, 1).amin(-1)
        assert (total >= share - 1e-6).all() and (total - least < share + 1e-6).all()


def test_blocks_that_count_are_found():
    """Every block of queries points at one other block of keys."""
    towards = torch.randn(10, 16, generator=generator())
    target = torch.randperm(10, generator=generator(1))
    k = 6 * F.normalize(towards, dim=1).repeat_interleave(32, 0)[None, None]
    q = k.unflatten(2, (10, 32))[:, :, target].flatten(2, 3)
    levels = pyramid_levels(q, k, (32, 32), shares=(0.1, 0.1, 0.1, 0.1))
    assert (levels[0, 0].argmax(-1) == target).all() and levels.sum() == 10


@given(queries=st.integers(1, 90), keys=st.integers(1, 90), prefix=st.integers(0, 40),
       mode=st.sampled_from(["topk", "thresholdbound"]), seed=st.integers(0, 9))
@settings(max_examples=40)
def test_levels_of_any_rows(queries, keys, prefix, mode, seed):
    (q, _, _), (_, k, _) = tokens(queries), tokens(keys)
    levels = pyramid_levels(q, k, BLOCKS, mode, prefix_tokens=prefix, generator=generator(seed))
    assert torch.equal(levels, pyramid_levels(q, k, BLOCKS, mode, prefix_tokens=prefix, generator=generator(seed)))
    assert levels.shape == (2, 2, math.ceil(queries / BLOCKS[0]), math.ceil(keys / BLOCKS[1]))
    assert torch.isin(levels, torch.tensor([0, 1, 2, 4, 8])).all() and (levels == 1).any(-1).all()
    if prefix:
        assert (levels[:, :, : math.ceil(prefix / BLOCKS[0])] == 1).all() and (levels[..., : math.ceil(prefix / BLOCKS[1])] == 1).all()


def test_other_places_are_drawn_in_each_call():
    q, k, _ = tokens(300)
    state = generator()
    assert len({tuple(pyramid_levels(q, k, BLOCKS, generator=state).flatten().tolist()) for _ in range(3)}) == 3


def test_scores_of_parts_make_the_same_levels(monkeypatch):
    q, k, _ = tokens(300)
    expected = pyramid_levels(q, k, BLOCKS, generator=generator())
    monkeypatch.setattr(pyramid_sparse, "SCORES_AT_ONCE", 1)
    assert torch.equal(pyramid_levels(q, k, BLOCKS, generator=generator()), expected)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(mode="top"), "mode must be one of topk, thresholdbound, got 'top'"),
    (dict(shares=(0.1, 0.2)), r"shares must be four numbers that rise from 0 to 1, .*, got \(0.1, 0.2\)"),
    (dict(shares=(0.3, 0.2, 0.4, 0.5)), "shares must be four numbers that rise"),
    (dict(shares=(0.3, 0.4, 0.5, 1.5)), "shares must be four numbers that rise"),
])
def test_what_is_no_mode_or_share_is_named(arguments, message):
    q, k, _ = tokens(40)
    with pytest.raises(ValueError, match=message):
        pyramid_levels(q, k, **arguments)
    with pytest.raises(ValueError, match=message):
        PyramidSparseAttention(2, 8, **arguments)


def test_other_wrong_arguments_are_named():
    q, k, _ = tokens(40)
    for wrong, error in ((dict(k=k[:, :1]), "k must have q's batch, heads and channels"), (dict(block_size=8), "block_size must be a pair"),
                         (dict(prefix_tokens=-1), "prefix_tokens must be at least 0"), (dict(scale=math.nan), "scale must be finite"),
                         (dict(q=q[0]), r"q must be \(B, heads, N, d\)")):
        with pytest.raises(ValueError, match=f"^pyramid_levels: {error}.*, got"):
            pyramid_levels(**dict(q=q, k=k) | wrong)
    for wrong, error in ((dict(prefix_tokens=-1), "prefix_tokens must be at least 0"), (dict(block_size=(8, 9)), "block_size must have")):
        with pytest.raises(ValueError, match=f"^PyramidSparseAttention: {error}.*, got"):
            PyramidSparseAttention(2, 8, **wrong)
    with pytest.raises(ValueError, match="height and width must be at least 1, got 0 and 3"):
        gilbert_order(0, 3)


def layer(**args):
    return PyramidSparseAttention(2, 8, **dict(grid=GRID, prefix_tokens=1, block_size=BLOCKS) | args)


def test_is_the_operator_on_tokens_along_the_curve():
    q, k, v = tokens(193)
    order = torch.cat((torch.zeros(1).long(), 1 + gilbert_order(*GRID)))
    module = layer()
    with zoo.capture(module) as maps:
        out = module(q, k, v)
    levels, attention = maps[""]["levels"], maps[""]["attention"]
    expected = pyramid_sparse_attention(*(x[:, :, order] for x in (q, k, v)), levels, BLOCKS)
    torch.testing.assert_close(out[:, :, order], expected)
    torch.testing.assert_close(attention @ v, out)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 193))
    assert set(levels.unique().tolist()) == {0, 1, 2, 4, 8} and (attention == 0).any()
    assert torch.equal(module(q, k, v), out) and torch.equal(layer()(q, k, v), out)
    assert not torch.equal(layer(seed=1)(q, k, v), out)
    assert layer(grid=None)(q, k, v).shape == out.shape


def test_with_everything_whole_or_in_short_rows_it_is_softmax_attention():
    q, k, v = tokens(193)
    torch.testing.assert_close(layer(shares=EVERYTHING)(q, k, v, scale=0.2), F.scaled_dot_product_attention(q, k, v, scale=0.2))
    q, k, v = tokens(16)
    torch.testing.assert_close(layer()(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_what_it_reads_brings_it_near_softmax_attention():
    q, k, v = tokens(193)
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = [(layer(grid=None, shares=shares)(q, k, v) - exact).norm() / exact.norm()
              for shares in ((0.5, 1.0, 1.0, 1.0), (0.3, 0.5, 0.8, 1.0), (0.1, 0.2, 0.3, 0.4))]
    assert errors[0] < errors[1] < errors[2] and errors[0] < 0.2


def test_refuses_what_it_cannot_do():
    q, k, v = tokens(193)
    for arguments, message in [
        ((q, k, v, torch.zeros(193, 193)), r"takes no masks and no biases of logits, got one of shape \(193, 193\)"),
        ((q, k, v, None, 0.3, 0.1), r"no attention weights of tokens that dropout \(0.1\) could leave out"),
        (tokens(192), r"with grid \(12, 16\) and prefix_tokens 1 takes 193 tokens, got 192"),
    ]:
        with pytest.raises(ValueError, match=f"^PyramidSparseAttention .*{message}"):
            layer()(*arguments)


@pytest.fixture(scope="module")
def vit():
    """A network of 192 tokens and a class token, of attention that is far from uniform; 60 % of the blocks are left out."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), patch_size=4, depth=2, embed_dim=48, num_classes=5).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def replaced(vit, **args):
    return zoo.replace_attention(copy.deepcopy(vit), "pyramid_sparse", **dict(
        grid=vit.patch_embed.grid_size, prefix_tokens=vit.num_prefix_tokens, block_size=BLOCKS) | args)


def pictures(batch=2):
    return F.interpolate(torch.randn(batch, 3, 12, 16, generator=generator(1)), (48, 64), mode="bicubic")


def test_in_a_network_without_training(vit):
    x = pictures()
    with torch.no_grad():
        expected = vit(x)
        torch.testing.assert_close(replaced(vit, shares=EVERYTHING)(x), expected, atol=1e-5, rtol=1e-5)
        errors = [(replaced(vit, mode=mode, shares=shares)(x) - expected).norm() / expected.norm() for mode, shares in (
            ("topk", (0.5, 0.6, 0.8, 1.0)), ("topk", None), ("thresholdbound", None))]
        assert 0 < errors[0] < errors[1] and errors[2] < 1
        assert torch.equal(replaced(vit)(x), replaced(vit)(x))
    model = replaced(vit)
    assert model.state_dict().keys() == vit.state_dict().keys()
    model.load_state_dict(vit.state_dict())


def test_compiles_whole_exports_and_is_captured(vit, tmp_path):
    model, x = replaced(vit), pictures()
    with torch.no_grad():
        with zoo.capture(model) as maps:
            expected = model(x)
        assert maps["blocks.1.attn.mechanism"]["levels"].shape == (2, 3, 7, 13)
        assert maps["blocks.1.attn.mechanism"]["attention"].shape == (2, 3, 193, 193)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-5, rtol=1e-5)
        batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=batch)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for some in (x, x[:1]):
        np.testing.assert_allclose(session.run(None, {"x": some.numpy()})[0], model(some).detach(), atol=1e-4, rtol=1e-4)


def test_learns_and_is_saved_with_nothing_new(vit):
    model = replaced(vit).train()
    model(pictures()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_networks_that_it_does_not_fit(vit):
    with pytest.raises(InputError, match=r"PyramidSparseAttention does not fit \S+attn, \w*Attention, which adds relative positions"):
        zoo.replace_attention(timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=3), "pyramid_sparse")
    with pytest.raises(InputError, match="which drops attention weights"):
        zoo.replace_attention(timm.create_model("vit_tiny_patch16_224", depth=1, attn_drop_rate=0.1), "pyramid_sparse")
    with pytest.raises(ValueError, match=r"with grid \(12, 12\) and prefix_tokens 1 takes 145 tokens, got 193"):
        replaced(vit, grid=(12, 12))(pictures())
    with pytest.raises(InputError, match="no attention for blocks.0.attn can be made: mode must be one of topk, thresholdbound, got 'top'"):
        replaced(vit, mode="top")


def test_levels_are_constants_of_gradients():
    q, k, v = (x.clone().requires_grad_() for x in tokens(193))
    module = layer()
    with zoo.capture(module) as maps:
        out = module(q, k, v)
    assert not maps[""]["levels"].requires_grad
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    order = module.order
    again = [x.detach()[:, :, order].requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(
        pyramid_sparse_attention(*again, maps[""]["levels"], BLOCKS).square().sum(), again)
    torch.testing.assert_close([x[:, :, order] for x in gradients], list(expected))


def test_memory_is_far_below_that_of_all_scores():
    q, k, v = tokens(2049)
    largest = 0
    module = layer(grid=(32, 64), block_size=(128, 128))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    with Seen(), torch.no_grad():
        module(q, k, v)
    assert largest <= 2 * 2 * 2049**2 / 10
