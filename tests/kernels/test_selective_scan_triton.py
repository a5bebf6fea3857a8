import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from zoo.kernels import _launch, selective_scan
from zoo.kernels.selective_scan import triton

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "positions first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "channels innermost": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "backwards": lambda x: x.flip(-1).contiguous().flip(-1),
}


@pytest.fixture
def short_chunks(monkeypatch):
    """Of eight positions, as the interpreter takes long for each."""
    def forget():
        for plans in _launch._plans:
            plans.clear()

    monkeypatch.setattr(triton, "CHUNK", 8)
    forget()
    yield
    forget()


def on_device(device, batch, channels, states, groups, length, dtype=torch.float32):
    """The seven arguments."""
    generator = torch.Generator().manual_seed(0)
    of_channels, of_states = (batch, channels, length), (batch, groups, states, length)
    shapes = of_channels, of_channels, (channels, states), of_states, of_states, (channels,), (channels,)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[2] = -(2 * tensors[2]).exp()
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def near(ours, theirs, tolerance):
    """Of the largest."""
    torch.testing.assert_close(ours, theirs, atol=tolerance * theirs.abs().max().item(), rtol=0)


def run(inputs, backend, layout="contiguous", softplus=True):
    out = selective_scan(*(LAYOUTS[layout](x) if x.ndim > 2 else x for x in inputs), delta_softplus=softplus, backend=backend)
    cotangent = ((5 * torch.arange(out.numel(), device=out.device) % 11 - 5) / 8).view(out.shape).to(out.dtype)  # exact in every dtype
    return out, *torch.autograd.grad(out, inputs, LAYOUTS[layout](cotangent))


@pytest.mark.parametrize(("sizes", "dtype", "layout"), [
    ((1, 3, 4, 1, 19), torch.float32, "contiguous"), ((2, 2, 3, 2, 8), torch.float32, "backwards"),
    ((1, 33, 1, 1, 3), torch.float32, "channels innermost"), ((1, 35, 17, 1, 2), torch.bfloat16, "positions first"),
    ((1, 4, 5, 1, 9), torch.float16, "strided"), ((1, 2, 2, 1, 1), torch.bfloat16, "contiguous"),
], ids=str)
def test_values_and_gradients_are_those_of_the_reference(kernel_device, short_chunks, sizes, dtype, layout):
    """Lengths in and between chunks and steps, channels of more than one tile, states that are no power of two."""
    inputs = on_device(kernel_device, *sizes, dtype=dtype)
    expected = run([x.detach().double().requires_grad_() for x in inputs], "reference")
    for ours, theirs in zip(run(inputs, "triton", layout), expected, strict=True):
        assert ours.dtype == dtype
        near(ours.double(), theirs, 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_chunks_as_they_are(kernel_device):
    inputs = on_device(kernel_device, 1, 2, 2, 1, 66)
    for ours, theirs in zip(run(inputs, "triton"), run(inputs, "reference"), strict=True):
        near(ours, theirs, 2e-6)


def test_without_softplus_d_and_bias(kernel_device, short_chunks):
    inputs = [x.detach().abs().requires_grad_() if i == 1 else x for i, x in enumerate(on_device(kernel_device, 1, 3, 2, 1, 10)[:5])]
    for ours, theirs in zip(run(inputs, "triton", softplus=False), run(inputs, "reference", softplus=False), strict=True):
        near(ours, theirs, 2e-6)


@pytest.mark.parametrize("raw", [-80.0, -16.0, -7.0, 0.0, 19.9, 20.1, 90.0])
def test_softplus_is_accurate_where_it_is_small_and_where_it_is_large(kernel_device, raw):
    """u, B, C and a state that fades at once: out is δ."""
    ones = torch.ones(1, 1, 1, device=kernel_device)
    delta = torch.full_like(ones, raw)
    out = selective_scan(ones, delta, -ones[0], ones[None], ones[None], delta_softplus=True, backend="triton")
    torch.testing.assert_close(out.double(), torch.nn.functional.softplus(delta.double()), rtol=1e-6, atol=0)


def test_states_that_vanish_do_no_harm(kernel_device, short_chunks):
    inputs = on_device(kernel_device, 1, 2, 2, 1, 10)
    inputs[1] = torch.where(torch.arange(10, device=kernel_device) % 3 == 0, 1e4, 1e-9).expand(1, 2, 10).clone().requires_grad_()
    for ours, theirs in zip(run(inputs, "triton", softplus=False), run(inputs, "reference", softplus=False), strict=True):
        near(ours, theirs, 2e-6)


def test_gradients_are_the_same_again(kernel_device):
    inputs = on_device(kernel_device, 1, 40, 2, 1, 2)
    assert all(map(torch.equal, run(inputs, "triton"), run(inputs, "triton")))


def test_operators_are_well_registered(kernel_device):
    inputs = on_device(kernel_device, 1, 2, 2, 1, 2)
    torch.library.opcheck(triton.selective_scan, (*inputs, True))
    firsts = triton.selective_scan(*inputs, True)[1].detach()
    given = [x.detach() for x in (inputs[0], *inputs[:5])]
    torch.library.opcheck(triton.gradients, (*given, None, None, True, firsts))


def test_compiles_whole_and_checkpoints(kernel_device):
    inputs = on_device(kernel_device, 1, 2, 2, 1, 2)

    def loss(*inputs):
        return selective_scan(*inputs, delta_softplus=True, backend="triton").square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs), expected)
    torch.testing.assert_close(torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs), expected)


def test_autocast_mixes_dtypes_and_returns_that_of_u(kernel_device):
    inputs = on_device(kernel_device, 1, 2, 2, 1, 2)
    with torch.autocast(kernel_device, torch.bfloat16):
        out = selective_scan(inputs[0].bfloat16(), *inputs[1:], delta_softplus=True, backend="triton")
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), inputs)] == [torch.float32] * 7


def test_empty_batches_and_sequences(kernel_device):
    for sizes in ((0, 4, 2, 2, 5), (2, 4, 2, 2, 0)):
        inputs = on_device(kernel_device, *sizes)
        out, *gradients = run(inputs, "triton")
        assert out.shape == inputs[0].shape and [x.shape for x in gradients] == [x.shape for x in inputs]
        assert not any(x.any() for x in gradients)


def test_what_the_kernels_do_not_take(kernel_device):
    with pytest.raises(ValueError, match="the kernels take at most 32 states of a channel, not 33"):
        selective_scan(*on_device(kernel_device, 1, 2, 33, 1, 2), backend="triton")
    with FakeTensorMode(), torch.device(kernel_device), pytest.raises(ValueError, match="2³¹"):
        u, b = torch.empty(1, 1 << 16, 1 << 15), torch.empty(1, 1, 1, 1 << 15)
        selective_scan(u, u, torch.empty(1 << 16, 1), b, b, backend="triton")


def test_kept_for_the_backward_pass_is_one_state_of_a_chunk(kernel_device):
    inputs, kept = on_device(kernel_device, 1, 2, 2, 1, 2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        selective_scan(*inputs, delta_softplus=True, backend="triton")
    assert sum(t.numel() for t in kept) == sum(x.numel() for x in inputs) + 2 * 2
