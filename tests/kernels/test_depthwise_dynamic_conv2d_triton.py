import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from zoo.kernels import default_backend, depthwise_dynamic_conv2d
from zoo.kernels.depthwise_dynamic_conv2d.triton import depthwise_dynamic_conv2d as operator
from zoo.kernels.depthwise_dynamic_conv2d.triton import gradient_of_kernels
from zoo.layers import ATConv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "positions first": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


def problem(device, dtype=torch.float32, shape=(2, 3, 5, 4), sides=(3, 3), inhibited=True, seed=0):
    """Leaves x, kernels and, where inhibited, theta."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape, (*shape[:2], *sides), shape[1:2]][: 3 if inhibited else 2]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def run(inputs, backend, layout="contiguous"):
    out = depthwise_dynamic_conv2d(LAYOUTS[layout](inputs[0]), *inputs[1:], backend=backend)
    cotangent = ((5 * torch.arange(out.numel(), device=out.device) % 11 - 5) / 8).view(out.shape).to(out.dtype)  # exact in every dtype
    return out, *torch.autograd.grad(out, inputs, LAYOUTS[layout](cotangent), create_graph=True)


def assert_close(found, expected, dtype):
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * theirs.abs().max().item(), rtol=0)


@pytest.mark.long
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 17), st.integers(1, 17)),
    sides=st.tuples(*[st.sampled_from([1, 3, 5])] * 2), inhibited=st.booleans(), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99),
)
@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # shrinking would take long in the interpreter
def test_values_and_gradients_are_those_of_the_reference(kernel_device, layout, dtype, **shapes):
    inputs = problem(kernel_device, dtype, **shapes)
    expected = run([t.detach().double().requires_grad_() for t in inputs], "reference")
    found = run(inputs, "triton", layout)
    assert_close(found, expected, dtype)
    assert found[0].stride() == torch.empty_like(LAYOUTS[layout](inputs[0])).stride()


def test_gradients_of_gradients_are_those_of_the_reference(kernel_device):
    def second(inputs, backend):
        return torch.autograd.grad(sum(g.square().sum() for g in run(inputs, backend)[1:]), inputs)

    inputs = problem(kernel_device)
    assert_close(second(inputs, "triton"), second([t.detach().double().requires_grad_() for t in inputs], "reference"), torch.float32)


def test_gradient_of_kernels_of_a_large_map(kernel_device):
    """Positions in several shares, tiles and programs, in a fixed order."""
    inputs = problem(kernel_device, shape=(1, 2, 37, 61), sides=(1, 3))
    first, second = (run(inputs, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert_close(first, run([t.detach().double().requires_grad_() for t in inputs], "reference"), torch.float32)


def test_layer_runs_the_kernels(kernel_device):
    layer, x = ATConv(6).to(kernel_device), torch.randn(2, 6, 5, 4, device=kernel_device)
    torch.nn.init.normal_(layer.difference_control)
    found = []
    for backend in ("triton", "reference"):
        with default_backend(backend):
            out = layer(x)
            found.append((out, *torch.autograd.grad(out.square().sum(), layer.parameters())))
    torch.testing.assert_close(*found)


def test_operators_are_well_registered(kernel_device):
    x, kernels, theta = problem(kernel_device, shape=(1, 2, 3, 2))
    torch.library.opcheck(operator, (x, kernels, theta, False))
    torch.library.opcheck(gradient_of_kernels, (x, x.detach().clone().requires_grad_(), [3, 1], True))


def test_compiles_whole_and_checkpoints(kernel_device):
    inputs = problem(kernel_device)

    def loss(*inputs):
        return depthwise_dynamic_conv2d(*inputs, backend="triton").square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs), expected)
    torch.testing.assert_close(torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs), expected)


def test_autocast_mixes_dtypes_and_returns_that_of_x(kernel_device):
    x, kernels, theta = problem(kernel_device)
    with torch.autocast(kernel_device, torch.bfloat16):
        out = depthwise_dynamic_conv2d(x.bfloat16(), kernels, theta, backend="triton")
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), (x, kernels, theta))] == [torch.float32] * 3


def test_empty_batches_and_samples_beyond_32_bits(kernel_device):
    x, kernels, theta = (t.detach() for t in problem(kernel_device))
    depthwise_dynamic_conv2d(x[:0], kernels[:0].requires_grad_(), theta, backend="triton").sum().backward()
    with FakeTensorMode(), torch.device(kernel_device), pytest.raises(ValueError, match="2³¹"):
        depthwise_dynamic_conv2d(torch.empty(1, 1, 1 << 16, (1 << 15) + 1), torch.empty(1, 1, 3, 3), backend="triton")
