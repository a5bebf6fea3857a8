import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.kernels import depthwise_dynamic_conv2d
from zoo.kernels.depthwise_dynamic_conv2d import grouped, positions_first, reference

FORMULATIONS = [reference, grouped, positions_first]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "positions first": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}
SHAPES = {  # of the map, of the kernel
    "square": ((2, 3, 6, 6), (3, 3)),
    "ragged": ((3, 2, 5, 7), (5, 3)),
    "one position": ((2, 3, 1, 1), (3, 3)),
    "map below kernel": ((1, 2, 2, 1), (5, 5)),
    "one channel": ((3, 1, 4, 4), (3, 3)),
    "1×1 kernel": ((2, 4, 3, 3), (1, 1)),
}


def oracle(x, kernels, theta=None):
    """The definition, a loop over samples, channels, positions and places of the kernel."""
    if theta is not None:
        kernels = kernels - torch.stack([torch.sigmoid(t) * kernels[:, c].mean((1, 2)) for c, t in enumerate(theta)], 1)[..., None, None]
    (b, c, h, w), (rows, columns) = x.shape, kernels.shape[2:]
    out = torch.zeros_like(x)
    for n, m, i, j in np.ndindex(b, c, h, w):
        for u, v in np.ndindex(rows, columns):
            y, z = i + u - rows // 2, j + v - columns // 2
            if 0 <= y < h and 0 <= z < w:
                out[n, m, i, j] = out[n, m, i, j] + kernels[n, m, u, v] * x[n, m, y, z]
    return out


def problem(shape, sides, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = shape, (*shape[:2], *sides), shape[1:2]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("inhibition", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_definition_with_gradients_in_every_layout(name, layout, inhibition):
    inputs = problem(*SHAPES[name])[: 3 if inhibition else 2]
    expected = oracle(*inputs)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = expected, *torch.autograd.grad(expected, inputs, cotangent)
    out = depthwise_dynamic_conv2d(LAYOUTS[layout](inputs[0]), *inputs[1:])
    torch.testing.assert_close((out, *torch.autograd.grad(out, inputs, cotangent)), expected)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_formulation_is_the_definition(name, formulation):
    x, kernels, _ = problem(*SHAPES[name])
    torch.testing.assert_close(formulation.depthwise_dynamic_conv2d(x, kernels), oracle(x, kernels))


@given(b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 7), w=st.integers(1, 7), sides=st.tuples(*[st.sampled_from([1, 3])] * 2),
       layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_any_shape(b, c, h, w, sides, layout, seed):
    with torch.no_grad():
        x, kernels, theta = problem((b, c, h, w), sides, seed=seed)
        torch.testing.assert_close(depthwise_dynamic_conv2d(LAYOUTS[layout](x), kernels, theta), oracle(x, kernels, theta))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_float64(layout):
    def function(x, kernels, theta):
        return depthwise_dynamic_conv2d(LAYOUTS[layout](x), kernels, theta)

    inputs = problem((2, 3, 4, 5), (3, 3))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "positions first"])
def test_keeps_the_layout(layout):
    x, kernels, theta = problem((2, 3, 4, 5), (3, 3))
    assert depthwise_dynamic_conv2d(LAYOUTS[layout](x), kernels, theta).stride() == LAYOUTS[layout](x).stride()


@pytest.mark.parametrize(("layout", "copies"), [("contiguous", 0), ("positions first", 0), ("channels last", 2)])
def test_copies_no_map_it_need_not(layout, copies):
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.count += function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and out.numel() == x.numel()
            return out

    x, kernels, _ = problem((2, 3, 8, 8), (3, 3), torch.float32)
    x = LAYOUTS[layout](x.detach())
    with torch.no_grad(), Copies() as counted:
        depthwise_dynamic_conv2d(x, kernels)
    assert counted.count == copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lower_precision(layout, dtype):
    inputs = problem((2, 16, 9, 12), (3, 3), dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = (depthwise_dynamic_conv2d(LAYOUTS[layout](x), *rest) for x, *rest in (inputs, exact))
    assert ours.dtype == dtype
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = (ours, *torch.autograd.grad(ours, inputs, cotangent)), (theirs, *torch.autograd.grad(theirs, exact, cotangent.double()))
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance * other.detach().abs().max().item(), rtol=0)


def test_autocast():
    x, kernels, theta = problem((2, 8, 6, 6), (3, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_dynamic_conv2d(x, kernels.bfloat16(), theta)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), depthwise_dynamic_conv2d(x, kernels, theta), atol=0.1, rtol=0.02)


def test_full_inhibition_makes_kernels_sum_to_zero():
    _, kernels, _ = problem((2, 3, 7, 7), (3, 3))
    constant = torch.ones(2, 3, 7, 7, dtype=torch.float64)
    theta = torch.full((3,), torch.inf, dtype=torch.float64)
    out = depthwise_dynamic_conv2d(constant, kernels, theta)
    torch.testing.assert_close(out[:, :, 1:-1, 1:-1], torch.zeros(2, 3, 5, 5, dtype=torch.float64))
    assert out[:, :, 0].abs().max() > 0.1  # the border sees part of the kernel
    assert torch.equal(depthwise_dynamic_conv2d(constant, kernels, -theta), depthwise_dynamic_conv2d(constant, kernels))


def test_the_same_kernels_for_all_samples_are_a_depthwise_convolution():
    x, kernels, _ = problem((3, 4, 6, 5), (3, 3))
    expected = F.conv2d(x, kernels[0, :, None], padding=1, groups=4)
    torch.testing.assert_close(depthwise_dynamic_conv2d(x, kernels[:1].expand(3, -1, -1, -1)), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_compiles_whole(layout):
    compiled = torch.compile(depthwise_dynamic_conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x, kernels, theta = problem((batch, 4, 6, 5), (3, 3), torch.float32)
        x = LAYOUTS[layout](x.detach()).requires_grad_()
        out, expected = compiled(x, kernels, theta), depthwise_dynamic_conv2d(x, kernels, theta)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), theta), torch.autograd.grad(expected.sum(), theta))


class Convolve(nn.Module):
    def forward(self, x, kernels, theta):
        return depthwise_dynamic_conv2d(x, kernels, theta)


@pytest.mark.parametrize(("free_batch", "operator"), [(True, "MatMul"), (False, "Conv")])
def test_onnx_runs_at_other_sizes(free_batch, operator, tmp_path):
    free = ({0: torch.export.Dim.DYNAMIC} if free_batch else {})
    size = free | {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    inputs = [x.detach() for x in problem((2, 4, 9, 11), (3, 3), torch.float32)]
    program = torch.export.export(Convolve(), tuple(inputs), dynamic_shapes=(size, free, None))
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["x", "kernels", "theta"])
    onnx.save(tmp_path / "x.onnx")
    assert operator in {node.op_type for node in onnx.model.graph}
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for shape in [(5 if free_batch else 2, 4, 7, 20), (1 if free_batch else 2, 4, 30, 3)]:
        x, kernels, theta = (x.detach() for x in problem(shape, (3, 3), torch.float32))
        found = session.run(None, {"x": x.numpy(), "kernels": kernels.numpy(), "theta": theta.numpy()})[0]
        np.testing.assert_allclose(found, depthwise_dynamic_conv2d(x, kernels, theta).numpy(), atol=1e-5)


def test_bad_input_is_named():
    x, kernels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 3, 3)
    for arguments, error, message in [
        ((x[0], kernels), ValueError, r"x must be \(B, C, H, W\), got shape \(3, 4, 4\)"),
        ((x.long(), kernels), TypeError, "floating dtype, .* torch.int64"),
        ((x, kernels[:1]), ValueError, r"kernels must be .* got \(1, 3, 3, 3\)"),
        ((x, kernels[..., :2]), ValueError, r"odd sides, got \(3, 2\)"),
        ((x, kernels.double()), TypeError, r"dtype of x \(torch.float32\), got torch.float64"),
        ((x, kernels, torch.zeros(2)), ValueError, r"theta must be \(C,\) = \(3,\), got \(2,\)"),
    ]:
        with pytest.raises(error, match=message):
            depthwise_dynamic_conv2d(*arguments)
