import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import default_backend, halo_attention
from zoo.kernels.halo_attention.triton import halo_attention as operator
from zoo.layers import HaloAttention

reference = sys.modules["zoo.kernels.halo_attention.reference"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(device, size, block, halo, stride=1, heads=1, widths=(5, 20), batch=1, dtype=torch.float32, seed=0):
    """Maps with channels before positions in memory."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    maps = (draw(batch, heads, width, *size) for width in (widths[0], *widths))
    q, k, v = (x.permute(0, 3, 4, 1, 2).detach().requires_grad_() for x in maps)
    q = q[:, ::stride, ::stride].detach().requires_grad_()
    tables = (draw(block + 2 * halo + block // stride - 1, widths[0]) for _ in range(2))
    return q, k, v, *tables, block, halo, 0.4


def with_gradients(function, arguments):
    out = function(*arguments)
    return out, *torch.autograd.grad(out, arguments[:5], cotangent(out))


def cotangent(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def kernels(*arguments):
    return operator(*arguments)[0]


def check(arguments):
    """Values and all gradients are those of the definition in float64, to the rounding of the arguments' dtype.

    The backward pass subtracts every query's share, the sum of its gradient times its output, which is rounded: where attention is
    nearly all on one key, what is left is no longer large beside the share's rounding.
    """
    exact = [x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    expected = with_gradients(reference.halo_attention, exact)
    share = (cotangent(expected[0]) * expected[0]).abs().sum(-1).max().item()
    for place, (ours, theirs) in enumerate(zip(with_gradients(kernels, arguments), expected, strict=True)):
        assert ours.dtype == arguments[0].dtype
        tolerance = 1e-5 if ours.dtype == torch.float32 else 8 * torch.finfo(ours.dtype).eps
        size = max(1, theirs.abs().max().item(), share if place else 0)
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * size, rtol=0)


@pytest.mark.long
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)), side=st.integers(1, 3), halo=st.integers(0, 4), stride=st.integers(1, 2),
    heads=st.integers(1, 2), widths=st.tuples(st.integers(1, 33), st.integers(1, 33)), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=8)
def test_values_and_gradients_are_those_of_the_reference(kernel_device, size, side, halo, stride, heads, widths, dtype, seed):
    check(problem(kernel_device, size, side * stride, halo, stride, heads, widths, dtype=dtype, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_of_queries_and_patches_of_keys(kernel_device, dtype):
    check(problem(kernel_device, (10, 9), 10, 3, widths=(16, 16), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_wider_than_a_block_of_keys(kernel_device, dtype):
    check(problem(kernel_device, (10, 9), 10, 12, widths=(16, 16), dtype=dtype))


def test_images_and_heads_stay_apart_and_runs_are_equal(kernel_device):
    arguments = problem(kernel_device, (4, 6), 4, 1, 2, heads=2, batch=2)
    check(arguments)
    once, again = (with_gradients(kernels, arguments) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_operator_is_well_registered(kernel_device):
    torch.library.opcheck(operator, problem(kernel_device, (3, 2), 2, 1))


def test_compiles_whole(kernel_device):
    *tensors, block, halo, scale = problem(kernel_device, (3, 2), 2, 1)

    def attention(*tensors):
        return halo_attention(*tensors, block, halo, scale=scale, backend="triton")

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, tensors), with_gradients(attention, tensors))


def test_layer_under_autocast_and_checkpointing(kernel_device):
    """Trains the same with its kernels as without them."""
    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=1, stride=2, block_size=4, halo_size=1).to(kernel_device)
    x = torch.randn(1, 16, 5, 4).to(kernel_device)
    results = []
    for backend in ("triton", "reference"):
        layer.zero_grad()
        with default_backend(backend), torch.autocast(kernel_device, torch.bfloat16):
            out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            out.float().square().sum().backward()
        results.append((out, *(parameter.grad for parameter in layer.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.03 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("dtype", "widths"), [(torch.float32, (64, 50)), (torch.bfloat16, (128, 100))])
def test_the_widest_heads(kernel_device, dtype, widths):
    q, *others, _ = problem(kernel_device, (3, 4), 2, 1, widths=widths, dtype=dtype)
    check(((q.detach() / 8).requires_grad_(), *others, 0.4))  # scores of ordinary size, of positions too


def test_what_the_kernels_cannot_do_is_named(kernel_device):
    wide, table = torch.zeros(1, 2, 2, 1, 160, device=kernel_device), torch.zeros(3, 160, device=kernel_device)
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: .* at most 64 channels a head in float32, not 160"):
        halo_attention(wide, wide, wide, table, table, 2, 0, backend="triton")
    assert halo_attention(wide, wide, wide, table, table, 2, 0).shape == wide.shape
