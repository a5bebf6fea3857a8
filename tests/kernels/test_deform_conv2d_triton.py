import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from zoo.kernels import deform_conv2d
from zoo.kernels.deform_conv2d.triton import deform_conv2d as operator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


def problem(device="cpu", dtype=torch.float32, size=(5, 6), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
            offset_groups=1, widths=(4, 3), masked=True, bias=True, batch=2, spread=1.5, seed=0):
    """x, offset, weight, bias, mask, then stride, padding, dilation. Groups have at least `widths` input and output channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    taps, channels, out_channels = kernel[0] * kernel[1], widths[0] * groups * offset_groups, widths[1] * groups
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)]
    return (draw(batch, channels, *size), draw(batch, 2 * offset_groups * taps, *out, scale=spread),
            draw(out_channels, channels // groups, *kernel), draw(out_channels) if bias else None,
            draw(batch, offset_groups * taps, *out) if masked else None, stride, padding, dilation)


def run(arguments, backend, dtype=None, layout="contiguous"):
    """Output and gradients of everything that has one, computed in `dtype`."""
    *tensors, stride, padding, dilation = arguments
    tensors = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    x, offset, weight, bias, mask = tensors
    out = deform_conv2d(LAYOUTS[layout](x), LAYOUTS[layout](offset), weight, bias, stride, padding, dilation,
                        mask if mask is None else LAYOUTS[layout](mask), backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(arguments[0]).to(out.dtype)
    return out, *torch.autograd.grad(out, [t for t in tensors if t is not None], LAYOUTS[layout](cotangent))


def assert_close(found, expected, dtype):
    """To within rounding, of samples and weights in the dtype, relative to the largest."""
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance * theirs.abs().max().item(), rtol=0)


@given(
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)), groups=st.integers(1, 2), offset_groups=st.integers(1, 2),
    widths=st.sampled_from([(1, 1), (3, 16), (5, 2), (20, 3), (3, 40)]), masked=st.booleans(), bias=st.booleans(), batch=st.integers(1, 3),
    spread=st.sampled_from([0.0, 1.0, 20.0]), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_values_and_gradients_are_those_of_the_reference(kernel_device, size, kernel, padding, dilation, dtype, layout, **rest):
    size = tuple(max(n, d * (k - 1) + 1 - 2 * p) for n, d, k, p in zip(size, dilation, kernel, padding, strict=True))
    arguments = problem(kernel_device, dtype, size, kernel, padding=padding, dilation=dilation, **rest)
    assert_close(run(arguments, "triton", layout=layout), run(arguments, "reference", torch.float64), dtype)


@pytest.mark.parametrize(("groups", "offset_groups"), itertools.product([2, 3], [1, 2, 4]))
def test_offset_groups_need_not_divide_groups(kernel_device, groups, offset_groups):
    arguments = problem(kernel_device, size=(3, 4), kernel=(1, 2), groups=groups, offset_groups=offset_groups, widths=(1, 2))
    assert_close(run(arguments, "triton"), run(arguments, "reference"), torch.float32)


@pytest.mark.parametrize("change", [dict(), dict(masked=False, widths=(3, 16), groups=2), dict(spread=20.0, dtype=torch.bfloat16)], ids=str)
def test_deterministic_gradients(kernel_device, change):
    """Many samples fall on few pixels; the fixed point is that of the gradients, whatever their size."""
    arguments = problem(kernel_device, size=(2, 2), padding=(4, 4), **change)
    expected = run(arguments, "reference", torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(arguments, "triton"), run(arguments, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(first, expected, arguments[0].dtype)
    assert all(map(torch.equal, first, second))
