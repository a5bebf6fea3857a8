import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from zoo.kernels import token_aware_avg_pool
from zoo.kernels.token_aware_avg_pool.triton import token_aware_avg_pool as operator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "strided": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


def problem(device, dtype=torch.float32, shape=(2, 5, 4, 3), pools=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in (shape, (*shape[:3], pools))]


def run(inputs, backend, layout="contiguous"):
    out = token_aware_avg_pool(*map(LAYOUTS[layout], inputs), backend)
    cotangent = ((5 * torch.arange(out.numel(), device=out.device) % 11 - 5) / 8).view(out.shape).to(out.dtype)  # exact in every dtype
    return out, *torch.autograd.grad(out, inputs, LAYOUTS[layout](cotangent))


@pytest.mark.long
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70)), pools=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99),
)
@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])  # shrinking would take long in the interpreter
def test_values_and_gradients_are_those_of_the_reference(kernel_device, layout, dtype, **shapes):
    inputs = problem(kernel_device, dtype, **shapes)
    expected = run([t.detach().double().requires_grad_() for t in inputs], "reference")
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for ours, theirs in zip(run(inputs, "triton", layout), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * theirs.abs().max().item(), rtol=0)


def test_gradients_are_the_same_again(kernel_device):
    inputs = problem(kernel_device, shape=(1, 7, 9, 5))
    assert all(map(torch.equal, run(inputs, "triton"), run(inputs, "triton")))


def test_operator_is_well_registered(kernel_device):
    torch.library.opcheck(operator, tuple(problem(kernel_device, shape=(1, 2, 3, 2), pools=2)))


def test_compiles_whole_and_checkpoints(kernel_device):
    inputs = problem(kernel_device)

    def loss(*inputs):
        return token_aware_avg_pool(*inputs, backend="triton").square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs), expected)
    torch.testing.assert_close(torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs), expected)


def test_autocast_mixes_dtypes_and_returns_that_of_x(kernel_device):
    x, weights = problem(kernel_device)
    with torch.autocast(kernel_device, torch.bfloat16):
        out = token_aware_avg_pool(x.bfloat16(), weights, backend="triton")
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), (x, weights))] == [torch.float32] * 2


def test_empty_batches_and_samples_beyond_32_bits(kernel_device):
    x, weights = problem(kernel_device)
    token_aware_avg_pool(x[:0], weights[:0], "triton").sum().backward()
    assert x.grad is not None and weights.grad is not None
    with FakeTensorMode(), torch.device(kernel_device), pytest.raises(ValueError, match="2³¹"):
        token_aware_avg_pool(*torch.empty(2, 1, 1 << 16, (1 << 15) + 1, 1), "triton")
