"""Pyramid sparse attention, on every backend against its definition token by token."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import kernels
from zoo.kernels import pyramid_sparse_attention
from zoo.kernels.pyramid_sparse_attention import blocked, reference, triton
from zoo.kernels.pyramid_sparse_attention._pyramid import counts, pyramid

BACKENDS = ["reference", "blocked", "triton"]
LEVELS = torch.tensor([0, 1, 2, 4, 8])


def problem(queries=19, tokens=37, blocks=(6, 16), widths=(5, 3), batch=1, heads=2, seed=0, dtype=torch.float32, device="cpu"):
    """q, k and v as slices of one tensor, as projections make them, and levels, of which none are those of the first queries."""
    generator = torch.Generator().manual_seed(seed)
    d, e = widths
    q, k, v = (torch.randn(batch, n, heads, width, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
               for n, width in ((queries, d), (tokens, d), (tokens, e)))
    shape = batch, heads, -(-queries // blocks[0]), -(-tokens // blocks[1])
    levels = LEVELS[torch.randint(5, shape, generator=generator)].to(device)
    levels[:, 0, 0] = 0
    return q, k, v, levels, blocks


def token_by_token(q, k, v, levels, blocks, scale=None):
    """The definition, a query and a block at a time."""
    scale, rows = q.shape[-1] ** -0.5 if scale is None else scale, []
    for image, head, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        logits, values = [], []
        for j, level in enumerate(levels[image, head, i // blocks[0]].tolist()):
            for first in range(0, blocks[1] if level else 0, max(level, 1)):
                group = slice(j * blocks[1] + first, min(j * blocks[1] + first + level, k.shape[2]))
                if group.start < group.stop:
                    logits.append(scale * q[image, head, i] @ k[image, head, group].mean(0) + math.log(group.stop - group.start))
                    values.append(v[image, head, group].mean(0))
        rows.append(torch.stack(logits).softmax(0) @ torch.stack(values) if logits else 0 * v[image, head, 0])
    return torch.stack(rows).view(*q.shape[:3], -1)


def with_gradients(function, arguments, cotangent_seed=7):
    out = function(*arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(cotangent_seed), dtype=torch.float64).to(out)
    return out, *torch.autograd.grad(out, arguments[:3], cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [
    dict(), dict(batch=2, heads=1), dict(queries=1, tokens=1), dict(queries=24, tokens=32, blocks=(8, 32)),
    dict(queries=5, tokens=9, blocks=(7, 8), widths=(1, 2)), dict(queries=70, tokens=130, blocks=(65, 40), heads=1),
])
def test_is_its_definition(backend, shape, kernel_device):
    arguments = problem(**shape, device=kernel_device)
    found = with_gradients(lambda *x: pyramid_sparse_attention(*x, backend=backend), arguments)
    torch.testing.assert_close(found, with_gradients(token_by_token, arguments), atol=2e-5, rtol=2e-5)


@given(queries=st.integers(1, 30), tokens=st.integers(1, 60), blocks=st.tuples(st.integers(1, 12), st.sampled_from([8, 16, 24])),
       seed=st.integers(0, 99))
@settings(max_examples=25)
def test_fast_is_the_definition_at_every_size(queries, tokens, blocks, seed):
    arguments = problem(queries, tokens, blocks, seed=seed)
    found, expected = (with_gradients(lambda *x, b=b: pyramid_sparse_attention(*x, backend=b), arguments) for b in ("blocked", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_level_one_it_is_attention(backend, kernel_device):
    q, k, v, levels, blocks = problem(device=kernel_device)
    out = pyramid_sparse_attention(q, k, v, torch.ones_like(levels), blocks, 0.3, backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_get_nothing_and_give_nothing(backend, kernel_device):
    q, k, v, levels, blocks = problem(device=kernel_device)
    out, of_q, of_k, _ = with_gradients(lambda *x: pyramid_sparse_attention(*x, backend=backend), (q, k, v, levels, blocks))
    assert not out[:, 0, : blocks[0]].any() and not of_q[:, 0, : blocks[0]].any() and out[:, 1, 0].any() and of_k.isfinite().all()
    out = with_gradients(lambda *x: pyramid_sparse_attention(*x, backend=backend), (q, k, v, torch.zeros_like(levels), blocks))
    assert not any(x.any() for x in out)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_left_out_reaches_nothing(backend, value, kernel_device):
    q, k, v, levels, blocks = problem(device=kernel_device)
    levels[:, :, 1:, 0] = 0
    expected = with_gradients(lambda *x: pyramid_sparse_attention(*x, backend=backend), (q, k, v, levels, blocks))
    broken = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        for x in broken[1:]:
            x[:, :, : blocks[1]] = value
    levels[:, :, 0, 0], levels[:, :, 0, 1] = 0, 1
    found = with_gradients(lambda *x: pyramid_sparse_attention(*x, backend=backend), (*broken, levels, blocks))
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found[0][:, :, blocks[0]:], expected[0][:, :, blocks[0]:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision(dtype, backend, kernel_device):
    arguments = problem(dtype=dtype, device=kernel_device)
    found = with_gradients(lambda *x: pyramid_sparse_attention(*x, backend=backend), arguments)
    exact = [x.detach().double().requires_grad_() for x in arguments[:3]]
    expected = with_gradients(lambda *x: pyramid_sparse_attention(*x, backend="reference"), (*exact, *arguments[3:]))
    assert all(x.dtype == dtype for x in found)
    bound = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close([x.double() for x in found], list(expected), atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_levels_of_any_integers(dtype, kernel_device):
    q, k, v, levels, blocks = problem(device=kernel_device)
    expected = pyramid_sparse_attention(q, k, v, levels, blocks, backend="reference")
    for backend in BACKENDS:
        torch.testing.assert_close(pyramid_sparse_attention(q, k, v, levels.to(dtype), blocks, backend=backend), expected)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_keeps_no_scores(backend, kernel_device):
    q, k, v, levels, blocks = problem(64, 96, (32, 32), device=kernel_device)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
        out = pyramid_sparse_attention(q, k, v, levels, blocks, backend=backend)
    rows = 96 * 15 // 8
    assert sum(kept.values()) <= q.numel() + 2 * rows * (5 + 3) + levels.numel() + out.numel() + 2 * 64 + 3 * 96


def test_compiles_whole_with_free_sizes():
    compiled = torch.compile(pyramid_sparse_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries, tokens in ((19, 37), (20, 50)):
        arguments = problem(queries, tokens)
        torch.testing.assert_close(with_gradients(compiled, arguments), with_gradients(pyramid_sparse_attention, arguments))


@pytest.mark.parametrize("operator", [blocked._forward, triton.pyramid_sparse_attention], ids=["blocked", "triton"])
def test_is_registered_soundly(operator, kernel_device):
    q, k, v, levels, (of_queries, of_keys) = problem(device=kernel_device)
    keys, values = (pyramid(x.detach(), levels.shape[3], of_keys).requires_grad_() for x in (k, v))
    torch.library.opcheck(operator, (q, keys, values, levels, k.shape[2], of_queries, of_keys, 0.5))


def test_pyramid_of_tokens():
    x = torch.arange(1.0, 12.0).view(1, 1, 11, 1)
    rows = pyramid(x, 2, 8).flatten().tolist()
    assert rows[:11] == list(range(1, 12)) and rows[11:16] == [0.0] * 5
    assert rows[16:24] == [1.5, 3.5, 5.5, 7.5, 9.5, 11.0, 0.0, 0.0]
    assert rows[24:] == [2.5, 6.5, 10.0, 0.0, 4.5, 10.0]
    assert counts(11, 2, 8, x.device).tolist() == [1] * 11 + [0] * 5 + [2] * 5 + [1, 0, 0, 4, 4, 3, 0, 8, 3]
    assert reference.flops((1, 2, 19, 5), (1, 2, 30, 5), (1, 2, 30, 3)) == 2 * 2 * 19 * 30 * 8


def test_bad_input_is_named():
    q, k, v, levels, blocks = problem()
    for changed, error, message in [
        (dict(levels=levels.float()), TypeError, "levels must be a tensor of whole numbers, got torch.float32"),
        (dict(levels=levels == 1), TypeError, "levels must be a tensor of whole numbers, got torch.bool"),
        (dict(levels=torch.full_like(levels, 3)), ValueError, "levels must be 0, 1, 2, 4 or 8, got 3"),
        (dict(levels=torch.full_like(levels, -1)), ValueError, "levels must be 0, 1, 2, 4 or 8, got -1"),
        (dict(levels=levels[:, :, 1:]), ValueError, r"levels must be \(1, 2, 4, 3\), one for each pair of blocks, got \(1, 2, 3, 3\)"),
        (dict(levels=levels.to("meta")), ValueError, r"levels must be on the device of q \(cpu\), got meta"),
        (dict(block_size=(6, 12)), ValueError, r"block_size must have a multiple of 8 as its second number, got \(6, 12\)"),
        (dict(block_size=(0, 8)), ValueError, "block_size must be at least 1, got 0"),
        (dict(block_size=16), ValueError, "block_size must be a pair, of queries and keys, got 16"),
        (dict(k=k[:, :1]), ValueError, r"k must have q's batch, heads and channels, \(1, 2, M, 5\), got \(1, 1, 37, 5\)"),
        (dict(v=v[:, :, 1:]), ValueError, r"v must be \(1, 2, 37, 'e'\), got \(1, 2, 36, 3\)"),
        (dict(scale=math.nan), ValueError, "scale must be finite, got nan"),
    ]:
        arguments = dict(q=q, k=k, v=v, levels=levels, block_size=blocks) | changed
        for backend in (None, *kernels.backends("pyramid_sparse_attention")):
            with pytest.raises(error, match=f"^pyramid_sparse_attention: {message}"):
                pyramid_sparse_attention(**arguments, backend=backend)
    wide = torch.zeros(1, 1, 8, 144)
    with pytest.raises(ValueError, match="the kernels take heads of at most 128 channels, not 144"):
        pyramid_sparse_attention(wide, wide, wide, torch.ones(1, 1, 1, 1).long(), (8, 8), backend="triton")
