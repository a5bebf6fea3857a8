import copy
import itertools
import math
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zoo.kernels import deform_conv2d
from zoo.kernels.deform_conv2d import _blocks, gathered, reference, sampled, spelled_out_in_exports

operator = sys.modules["zoo.kernels.deform_conv2d"]


@pytest.fixture(params=["gathered", "sampled"])
def way(request, monkeypatch):
    """Makes narrow maps without groups go either way."""
    monkeypatch.setattr(operator, "FEWEST_CHANNELS", 1 if request.param == "gathered" else math.inf)


def oracle(x, offset, weight, bias, mask, stride, padding, dilation):
    """The definition in Python's own numbers, a loop over outputs, channels, taps and corners."""
    (b, c, height, width), (out_channels, group_width, kh, kw) = x.shape, weight.shape
    taps, groups, offset_groups = kh * kw, c // group_width, offset.shape[1] // (2 * kh * kw)
    out = torch.zeros(b, out_channels, *offset.shape[2:], dtype=x.dtype)
    pixels, offsets, weights, factors = (None if t is None else t.tolist() for t in (x, offset, weight, mask))
    for n, o, i, j in itertools.product(*map(range, out.shape)):
        total = 0.0 if bias is None else bias[o].item()
        for channel, k in itertools.product(range(group_width), range(taps)):
            at = o // (out_channels // groups) * group_width + channel
            g = at // (c // offset_groups)
            row = i * stride[0] - padding[0] + k // kw * dilation[0] + offsets[n][2 * (g * taps + k)][i][j]
            column = j * stride[1] - padding[1] + k % kw * dilation[1] + offsets[n][2 * (g * taps + k) + 1][i][j]
            factor = weights[o][channel][k // kw][k % kw] * (1 if mask is None else factors[n][g * taps + k][i][j])
            for h, w in itertools.product((math.floor(row), math.floor(row) + 1), (math.floor(column), math.floor(column) + 1)):
                if 0 <= h < height and 0 <= w < width:
                    total += factor * pixels[n][at][h][w] * (1 - abs(row - h)) * (1 - abs(column - w))
        out[n, o, i, j] = total
    return out


def problem(size=(5, 6), channels=(4, 6), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, offset_groups=1,
            masked=False, bias=True, batch=2, spread=1.5, dtype=torch.float64, seed=0):
    """Leaves x, offset, weight, bias, mask (or None), then stride, padding, dilation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    taps = kernel[0] * kernel[1]
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)]
    return (draw(batch, channels[0], *size), draw(batch, 2 * offset_groups * taps, *out, scale=spread),
            draw(channels[1], channels[0] // groups, *kernel), draw(channels[1]) if bias else None,
            draw(batch, offset_groups * taps, *out) if masked else None, stride, padding, dilation)


PROBLEMS = {
    "plain": dict(),
    "masked": dict(masked=True),
    "groups": dict(groups=2, masked=True),
    "offset groups": dict(offset_groups=2, masked=True, bias=False),
    "both groups": dict(channels=(6, 9), groups=3, offset_groups=2, masked=True),
    "token merging": dict(size=(6, 8), kernel=(2, 2), stride=(2, 2), padding=(0, 0), batch=3),
    "dilated": dict(size=(7, 5), padding=(2, 1), dilation=(2, 1), stride=(1, 2)),
    "oblong": dict(size=(3, 9), kernel=(1, 4), padding=(0, 2)),
    "far outside": dict(spread=20.0, masked=True),
    "one position": dict(size=(1, 1), batch=3),
    "whole positions": dict(spread=0.0, masked=True),
}


def run(function, arguments):
    """Output and gradients of everything that has one."""
    inputs = [t for t in arguments[:5] if t is not None]
    out = function(*arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, cotangent)


def ours(x, offset, weight, bias, mask, stride, padding, dilation):
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


def torchvisions(x, offset, weight, bias, mask, stride, padding, dilation):
    return torchvision.ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


@pytest.mark.parametrize("name", PROBLEMS)
def test_is_the_definition(name, way):
    arguments = problem(**PROBLEMS[name])
    with torch.no_grad():
        expected = oracle(*arguments)
        torch.testing.assert_close(ours(*arguments), expected)
        torch.testing.assert_close(reference.deform_conv2d(*arguments), expected)


@pytest.mark.parametrize("at_once", [1, 300, 1 << 22])  # rows, images, everything
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients_are_those_of_torchvision(name, at_once, way, monkeypatch):
    monkeypatch.setattr(_blocks, "SAMPLES_AT_ONCE", at_once)
    arguments = problem(**PROBLEMS[name])
    torch.testing.assert_close(run(ours, arguments), run(torchvisions, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [7, 8, 56, 100])
def test_side_of_the_derivative_is_that_of_torchvision(length, dtype, way):
    """Samples on, and by one step of the arithmetic below and above, every pixel and edge of the map."""
    whole = torch.arange(-2, length + 2, dtype=dtype)
    places = torch.cat([whole, whole.nextafter(whole - 1), whole.nextafter(whole + 1)])
    y, x = torch.meshgrid(places, places, indexing="ij")
    image = torch.randn(1, 1, length, length, generator=torch.Generator().manual_seed(0), dtype=dtype, requires_grad=True)
    padding = length + 6  # of a 1×1 kernel, for as many outputs as there are places
    own = torch.arange(len(places), dtype=dtype) - padding
    offset = torch.stack((y - own[:, None], x - own))[None]
    arguments = (image, offset.requires_grad_(), torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True), None, None,
                 (1, 1), (padding, padding), (1, 1))
    tolerance = dict(atol=10000 * torch.finfo(dtype).eps, rtol=0)
    for found, expected in zip(run(ours, arguments)[:3], run(torchvisions, arguments)[:3], strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


MERGING = dict(kernel=(2, 2), stride=(2, 2), padding=(0, 0))  # of LITv2; the others are of DAS


@pytest.mark.parametrize(("channels", "side", "options"), [
    ((48, 256), 56, dict(groups=16)), ((192, 1024), 14, dict(groups=64)), ((384, 2048), 7, dict(groups=128)),
    ((96, 192), 56, MERGING), ((384, 768), 14, MERGING), ((64, 32), 30, dict(masked=True)),
], ids=str)
def test_agrees_with_torchvision_at_the_sizes_of_a_network(channels, side, options):
    arguments = problem((side, side), channels, dtype=torch.float32, **options)
    for found, expected in zip(run(ours, arguments), run(torchvisions, arguments), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_in_float64(name, way):
    *inputs, stride, padding, dilation = problem(**PROBLEMS[name])
    if name == "whole positions":
        pytest.skip("has no derivative there, only one from the right")
    present = [t for t in inputs if t is not None]

    def function(*tensors):
        tensors = iter(tensors)
        return ours(*(None if t is None else next(tensors) for t in inputs), stride, padding, dilation)

    assert torch.autograd.gradcheck(function, present, fast_mode=True)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)), groups=st.integers(1, 3), offset_groups=st.integers(1, 3),
    masked=st.booleans(), bias=st.booleans(), fewest=st.sampled_from([1, 100]),
    batch=st.integers(1, 5), at_once=st.integers(1, 2000), seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_agrees_with_torchvision_on_any_shape(size, kernel, stride, padding, dilation, groups, offset_groups, fewest, at_once, **rest):
    size = tuple(max(n, d * (k - 1) + 1 - 2 * p) for n, d, k, p in zip(size, dilation, kernel, padding, strict=True))
    channels = (groups * offset_groups * 2, groups * 2)
    arguments = problem(size, channels, kernel, stride, padding, dilation, groups, offset_groups, **rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks, "SAMPLES_AT_ONCE", at_once)
        patch.setattr(operator, "FEWEST_CHANNELS", fewest)
        torch.testing.assert_close(run(ours, arguments), run(torchvisions, arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision(dtype, way):
    arguments = problem((9, 12), masked=True, groups=2, dtype=dtype)
    exact = (t.detach().double().requires_grad_() if torch.is_tensor(t) else t for t in arguments)
    for found, expected in zip(run(ours, arguments), run(torchvisions, tuple(exact)), strict=True):
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_autocast_computes_in_float32_and_returns_the_dtype_of_x():
    x, offset, weight, *rest = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x.bfloat16(), offset.bfloat16(), weight, *rest)
    assert out.dtype == torch.bfloat16
    expected = ours(x.bfloat16().float(), offset.bfloat16().float(), weight, *rest)
    assert torch.equal(out, expected.bfloat16())
    assert torch.autograd.grad(out.float().sum(), weight)[0].dtype == torch.float32


def test_without_offsets_it_is_an_ordinary_convolution():
    x, offset, weight, bias, *_ = problem((9, 7), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, spread=0.0)
    expected = nn.functional.conv2d(x, weight, bias, (2, 1), (1, 2), (1, 2), 2)
    torch.testing.assert_close(ours(x, offset, weight, bias, None, (2, 1), (1, 2), (1, 2)), expected)


def test_memory_layouts_and_empty_batches(way):
    x, offset, weight, *rest = problem((6, 5))
    expected = ours(x, offset, weight, *rest)
    last = [t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, offset, weight)]
    found = ours(*last, *rest)
    torch.testing.assert_close(found, expected)
    for t in (found, *torch.autograd.grad(found.sum(), last)):
        assert t.is_contiguous(memory_format=torch.channels_last)
    for t in (expected, *torch.autograd.grad(expected.sum(), (x, offset, weight))):
        assert t.is_contiguous()
    assert ours(x[:0], offset[:0], weight, *rest).shape == (0, *expected.shape[1:])


def test_infinite_offsets_give_zero_and_undefined_ones_do_no_harm(way):
    x, offset, weight, _, *rest = problem(bias=False)
    assert not ours(x, torch.full_like(offset, float("inf")), weight, None, *rest).any()
    ours(x, torch.full_like(offset, float("nan")), weight, None, *rest)


@pytest.mark.parametrize(("side", "channels"), [(32, 16), (48, 64)])  # sampled, gathered
def test_memory_does_not_grow_with_the_batch(side, channels):
    """The largest tensor of forward and backward, seen by a dispatch mode, beside the arguments and the result."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
            return out

    arguments = problem((side, side), (channels, channels), batch=8, dtype=torch.float32)
    samples = 9 * arguments[0].numel()
    with Largest() as largest:
        ours(*arguments).sum().backward()
    assert largest.elements < samples / 4
    with Largest() as largest:
        reference.deform_conv2d(*arguments)
    assert largest.elements >= samples  # the check can fail


def test_operator_is_well_registered():
    for formulation, name in ((sampled, "both groups"), (sampled, "plain"), (gathered, "plain")):
        *tensors, stride, padding, dilation = problem(**PROBLEMS[name])
        torch.library.opcheck(formulation.deform_conv2d, (*tensors, list(stride), list(padding), list(dilation)))


def test_compiles_whole(way):
    arguments = problem(groups=2, masked=True, dtype=torch.float32)
    found = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), arguments)
    torch.testing.assert_close(found, run(ours, arguments))


class Layer(nn.Module):
    def __init__(self, groups=2, offset_groups=1, stride=1, masked=False, kernel=3, channels=8):
        super().__init__()
        taps = kernel**2 * offset_groups
        self.stride, self.padding, self.masked = stride, (kernel - 1) // 2, masked
        self.predict = nn.Conv2d(channels, (3 if masked else 2) * taps, kernel, stride, self.padding)
        self.weight = nn.Parameter(torch.randn(6, channels // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        predicted, mask = 2 * self.predict(x), None
        if self.masked:
            predicted, mask = predicted.tensor_split([2 * predicted.shape[1] // 3], 1)
        return deform_conv2d(x, predicted, self.weight, self.bias, self.stride, self.padding, mask=mask)


LAYERS = {"DAS": dict(), "merging": dict(groups=1, stride=2, kernel=2), "masked": dict(offset_groups=2, masked=True)}
FREE = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


def exported(layer, opset):
    x = torch.randn(2, 8, 32, 24)
    return torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=(FREE,), opset_version=opset, verbose=False).model_proto


def agrees(proto, layer):
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for shape in ((2, 8, 32, 24), (1, 8, 9, 13), (3, 8, 20, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], layer(x).numpy(), atol=2e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_exports_as_the_standard_operator(name):
    layer = Layer(**LAYERS[name]).eval()
    proto = exported(layer, 20)
    assert [node.op_type for node in proto.graph.node].count("DeformConv") == 1
    agrees(proto, layer)


@pytest.mark.parametrize("name", ["DAS", "masked"])
def test_exports_in_operators_of_opset_16(name):
    layer = Layer(**LAYERS[name]).eval()
    with spelled_out_in_exports():
        proto = exported(layer, 18)
    used = {node.op_type for node in proto.graph.node}
    assert "GridSample" in used and "DeformConv" not in used
    assert all(onnx.defs.has(op, 16) and onnx.defs.get_schema(op, 16) for op in used), used
    agrees(proto, layer)
    old = copy.deepcopy(proto)
    old.opset_import[0].version = 16
    onnx.checker.check_model(old, full_check=True)
    agrees(old, layer)


def test_exported_program_holds_torchvisions_operator():
    layer, x = Layer(masked=True).eval(), torch.randn(2, 8, 9, 7)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "torchvision.deform_conv2d" in str(program.graph)
    more = torch.randn(5, 8, 9, 7)
    torch.testing.assert_close(program.module()(more), layer(more))


def test_counts_its_operations():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = problem((8, 8), groups=2)
    with FlopCounterMode(display=False) as counter:
        ours(*arguments)
    assert counter.get_total_flops() == 2 * 2 * 8 * 8 * 6 * 2 * 9


@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(x=torch.zeros(2, 4, 5)), ValueError, r"x must be \(B, C, H, W\), got shape \(2, 4, 5\)"),
    (dict(x=torch.zeros(2, 4, 5, 6, dtype=torch.int64)), TypeError, "x must be of a floating dtype, .*, got torch.int64"),
    (dict(weight=torch.zeros(6, 4, 3, 3)), TypeError, r"weight must have the dtype of x \(torch.float64\), got torch.float32"),
    (dict(weight=torch.zeros(6, 3, 3, 3).double()), ValueError, r"weight must be \(Co, 4 / groups, kh, kw\)"),
    (dict(offset=torch.zeros(2, 20, 5, 6).double()), ValueError, "offset must have 18 channels for each of its groups"),
    (dict(offset=torch.zeros(2, 18, 4, 6).double()), ValueError, r"offset must be \(2, …, 5, 6\), got shape \(2, 18, 4, 6\)"),
    (dict(mask=torch.zeros(2, 18, 5, 6).double()), ValueError, r"mask must be \(2, 9, 5, 6\), got shape \(2, 18, 5, 6\)"),
    (dict(bias=torch.zeros(4).double()), ValueError, r"bias must be \(6,\), got shape \(4,\)"),
    (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
    (dict(x=torch.zeros(2, 0, 5, 6).double()), ValueError, "x must be .* of which B alone may be 0"),
])
def test_bad_input_is_named(change, error, message):
    names = ("x", "offset", "weight", "bias", "mask", "stride", "padding", "dilation")
    with pytest.raises(error, match=message):
        deform_conv2d(**dict(zip(names, problem(), strict=True)) | change)
