import contextlib

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import default_backend, deform_conv2d
from zoo.kernels._launch import overridden
from zoo.kernels.deform_conv2d.triton import deform_conv2d as operator
from zoo.kernels.deform_conv2d.triton import deform_conv2d_backward as gradient
from zoo.layers import DAS

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
    cotangent = ((5 * torch.arange(out.numel(), device=out.device) % 11 - 5) / 8).view(out.shape).to(out.dtype)  # exact in every dtype
    return out, *torch.autograd.grad(out, [t for t in tensors if t is not None], LAYOUTS[layout](cotangent))


def assert_close(found, expected, dtype):
    """To within rounding, of samples and weights in the dtype, relative to the largest."""
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance * theirs.abs().max().item(), rtol=0)


TILES = [(1, 16, 32, 32), (4, 4, 16, 64), (16, 1, 16, 32), (2, 16, 16, 64)]  # of taps, channels, output channels, positions


@contextlib.contextmanager
def tiled(*sizes):
    chosen = dict(zip(("TAPS", "CHANNELS", "OUTS", "POSITIONS"), sizes, strict=True), num_warps=4, num_stages=2)
    with contextlib.ExitStack() as stack:
        for kernel in ("forward", "backward_samples", "backward_weight"):
            stack.enter_context(overridden(f"deform_conv2d_{kernel}", chosen))
        yield


@pytest.mark.long
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)), widths=st.sampled_from([(1, 1), (3, 16), (5, 2), (20, 3), (3, 40)]),
    masked=st.booleans(), bias=st.booleans(), batch=st.integers(1, 2), spread=st.sampled_from([0.0, 1.0, 20.0]),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(sorted(LAYOUTS)), tile=st.sampled_from(TILES), seed=st.integers(0, 99),
)
@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # shrinking would take long in the interpreter
def test_values_and_gradients_are_those_of_the_reference(kernel_device, size, kernel, padding, dilation, dtype, layout, tile, **rest):
    size = tuple(max(n, d * (k - 1) + 1 - 2 * p) for n, d, k, p in zip(size, dilation, kernel, padding, strict=True))
    arguments = problem(kernel_device, dtype, size, kernel, padding=padding, dilation=dilation, **rest)
    with tiled(*tile):
        assert_close(run(arguments, "triton", layout=layout), run(arguments, "reference", torch.float64), dtype)


@pytest.mark.parametrize(("groups", "offset_groups", "layout"), [
    (2, 1, "strided"), (1, 2, "channels last"), (2, 3, "contiguous"), (3, 2, "strided"), (2, 4, "channels last")])
def test_any_groups_in_any_layout(kernel_device, groups, offset_groups, layout):
    arguments = problem(kernel_device, size=(3, 4), kernel=(1, 2), groups=groups, offset_groups=offset_groups, widths=(1, 2))
    with tiled(2, 8, 16, 32):
        assert_close(run(arguments, "triton", layout=layout), run(arguments, "reference"), torch.float32)


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


def test_undefined_and_infinite_offsets_sample_nothing(kernel_device):
    x, offset, *rest = problem(kernel_device, bias=False)
    for place in ("nan", "inf", "-inf"):
        out, grad_x, *_ = run((x, torch.full_like(offset, float(place)), *rest), "triton")
        assert not out.any() and not grad_x.any()


@pytest.mark.parametrize("masked", [False, True])
def test_operator_is_well_registered(kernel_device, masked):
    *tensors, stride, padding, dilation = problem(kernel_device, size=(2, 3), kernel=(1, 2), masked=masked, bias=masked, padding=(0, 0))
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    geometry = list(stride), list(padding), list(dilation)
    torch.library.opcheck(operator, (*tensors, *geometry))
    x, *others = (t if t is None else t.detach() for t in tensors)
    for maps in x, LAYOUTS["strided"](x):
        grad = torch.randn_like(operator(maps, *others, *geometry))
        torch.library.opcheck(gradient, (grad, maps, *others, *geometry), test_utils=("test_schema", "test_faketensor"))


def test_compiles_whole_and_checkpoints(kernel_device):
    x, offset, weight, bias, mask, *_ = problem(kernel_device, size=(3, 4), kernel=(1, 2), padding=(0, 0))
    inputs = [t.requires_grad_() for t in (x, offset, weight, bias, mask)]

    def loss(x, offset, weight, bias, mask):
        return deform_conv2d(x, offset, weight, bias, mask=mask, backend="triton").square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs), expected)
    torch.testing.assert_close(torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs), expected)


def test_autocast_mixes_dtypes_and_returns_that_of_x(kernel_device):
    x, offset, weight, *rest, stride, padding, dilation = problem(kernel_device, size=(3, 4), kernel=(1, 2), padding=(0, 0), masked=False)
    weight.requires_grad_()
    with torch.autocast(kernel_device, torch.bfloat16):
        out, rounded = (deform_conv2d(maps, offset.bfloat16(), weight, *rest[:1], stride, padding, dilation, backend="triton")
                        for maps in (x, x.bfloat16()))
    assert out.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.equal(out.bfloat16(), rounded)
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


def test_layer_runs_the_kernels(kernel_device):
    layer, x = DAS(4, group_width=2, kernel_size=1).to(kernel_device), torch.randn(1, 4, 3, 4, device=kernel_device)
    torch.nn.init.normal_(layer.offset.weight)
    found = []
    for backend in ("triton", "reference"):
        with default_backend(backend):
            out = layer(x)
            found.append((out, *torch.autograd.grad(out.square().sum(), layer.parameters())))
    torch.testing.assert_close(*found)


def test_empty_batch_and_counted_operations(kernel_device):
    x, offset, weight, bias, mask, *_ = problem(kernel_device, size=(3, 4), kernel=(1, 2), padding=(0, 0))
    empty = deform_conv2d(x[:0].requires_grad_(), offset[:0], weight, bias, mask=mask[:0], backend="triton")
    empty.sum().backward()
    with FlopCounterMode(display=False) as counter:
        out = deform_conv2d(x, offset, weight, bias, mask=mask, backend="triton")
    assert counter.get_total_flops() == 2 * out.numel() * weight[0].numel()


def test_images_beyond_32_bits_are_refused(kernel_device):
    with FakeTensorMode(), torch.device(kernel_device), pytest.raises(ValueError, match="2³¹"):
        x, offset, weight = torch.empty(1, 1, 1 << 16, (1 << 15) + 1), torch.empty(1, 2, 1, 1), torch.empty(1, 1, 1, 1)
        deform_conv2d(x, offset, weight, stride=1 << 16, backend="triton")
