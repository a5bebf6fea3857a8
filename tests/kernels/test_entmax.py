"""α-entmax, against the package of that name and against its definition."""
import itertools

import entmax as package
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import entmax
from zoo.kernels.entmax import newton

CASES = [*itertools.product((1.2, 1.5, 2.0), ("reference", "newton")), (1.01, "newton")]


def logits(*shape, scale=3.0, seed=0, dtype=torch.float64):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype).requires_grad_()


def of_package(z, alpha):
    return {1.5: package.entmax15, 2.0: package.sparsemax}.get(alpha, lambda z, dim: package.entmax_bisect(z, alpha, dim, 60))(z, dim=-1)


@pytest.fixture(params=[1 << 18, 20], ids=["one block", "blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setitem(newton.SCORES_AT_ONCE, "cpu", request.param)


@pytest.mark.parametrize(("alpha", "backend"), CASES)
def test_values_and_gradients_of_the_package(alpha, backend, block_size):
    z, cotangent = logits(2, 3, 4, 17), logits(2, 3, 4, 17, seed=1)
    found, expected = entmax(z, alpha, backend), of_package(z, alpha)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    if alpha > 1.01:
        assert (found == 0).any()
    torch.testing.assert_close(*(torch.autograd.grad(p, z, cotangent)[0] for p in (found, expected)), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("backend", ["reference", "newton"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1), (2, 3, 4, 1), ()])
def test_learned_alpha_of_the_package(shape, backend, block_size):
    z, cotangent = logits(2, 3, 4, 17), logits(2, 3, 4, 17, seed=1)
    alpha = (1 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    found, expected = entmax(z, alpha, backend), package.entmax_bisect(z, alpha.expand(2, 3, 4, 1), -1, 60)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(p, (z, alpha), cotangent) for p in (found, expected)), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("backend", ["reference", "newton"])
def test_alpha_near_one_is_softmax_also_in_single_precision(backend):
    """Where the formula taken literally divides what is left of rounding by (α - 1)²."""
    z, cotangent = logits(2, 5, 200), logits(2, 5, 200, seed=1)
    torch.testing.assert_close(entmax(z, torch.tensor(1 + 1e-7, dtype=torch.float64), backend), z.softmax(-1), atol=1e-5, rtol=1e-5)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = z.detach().to(dtype).requires_grad_(), torch.tensor(1.01, dtype=torch.float64).to(dtype).requires_grad_()
        p = entmax(*leaves, backend)
        found.append([x.double() for x in (p, *torch.autograd.grad(p, leaves, cotangent.to(dtype)))])
    torch.testing.assert_close(*found, atol=2e-6, rtol=1e-3)


@given(n=st.integers(1, 40), scale=st.sampled_from([0.0, 0.1, 3.0, 1e4]), alpha=st.sampled_from([1.001, 1.3, 1.5, 1.9, 2.0]),
       seed=st.integers(0, 99))
@settings(max_examples=30)
def test_is_a_distribution_that_keeps_order(n, scale, alpha, seed):
    with torch.no_grad():
        z = logits(3, n, scale=scale, seed=seed)
        found = [entmax(z, alpha, backend) for backend in ("reference", "newton")]
        for p in found:
            torch.testing.assert_close(p, found[0], atol=1e-7, rtol=1e-7)
            torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=p.dtype))
            assert (p >= 0).all() and (p.gather(-1, z.argsort(-1)).diff(dim=-1) >= -1e-12).all()


@pytest.mark.parametrize(("alpha", "backend"), CASES)
def test_masked_entries_get_nothing(alpha, backend):
    z = logits(3, 9, scale=0.3)
    mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4, [False] * 9])
    p = entmax(z.masked_fill(~mask, -torch.inf), alpha, backend)
    torch.testing.assert_close(p[1, :5], entmax(z[1, :5], alpha, backend))
    assert not p[~mask].any()
    gradient, = torch.autograd.grad(p.square().sum(), z)
    assert gradient.isfinite().all() and not gradient[~mask].any() and gradient[0].any()


def test_keeps_its_result_alone():
    z, kept = logits(4, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        p = entmax(z, 1.5, "newton")
    assert sum(t.numel() for t in kept) <= p.numel() + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_lower_precision(dtype, alpha):
    z = logits(4, 30, dtype=dtype)
    p, expected = entmax(z, alpha), entmax(z.double(), alpha)
    assert p.dtype == dtype
    torch.testing.assert_close(p.double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)
    assert torch.autograd.grad(p.square().sum(), z)[0].dtype == dtype


@pytest.mark.parametrize("alpha", [1.5, "learned"])
def test_compiles_whole_and_is_registered_soundly(alpha):
    given = torch.full((1,), 1.3, dtype=torch.float64, requires_grad=True) if alpha == "learned" else alpha
    compiled = torch.compile(lambda z: entmax(z, given), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8):
        z = logits(3, n)
        out, expected = compiled(z), entmax(z, given)
        torch.testing.assert_close((out, *torch.autograd.grad(out.square().sum(), z)),
                                   (expected, *torch.autograd.grad(expected.square().sum(), z)))
    torch.library.opcheck(newton.entmax_newton, (logits(3, 5), None, 1.5))
    torch.library.opcheck(newton.entmax_newton, (logits(3, 5), torch.full((3, 1), 1.3, dtype=torch.float64, requires_grad=True), 0.0))


@pytest.mark.parametrize("alpha", [1.01, 1.3, 1.5, 1.9, 2.0])
def test_weights_sum_to_one_where_newtons_steps_are_slow(alpha):
    """Logits at distances that double, of which a step leaves out few."""
    z = -torch.logspace(-30, 10, 400, base=2, dtype=torch.float64)
    for n in (1, 7, 400):
        for logits in (z[:n], z[-n:], z[::400 // n], torch.zeros(n, dtype=torch.float64)):
            p = entmax(logits, alpha)
            torch.testing.assert_close(p.sum(), torch.ones_like(p.sum()), atol=1e-12, rtol=0)
            torch.testing.assert_close(entmax(logits.float(), alpha).double(), p, atol=1e-6, rtol=1e-5)


def test_bad_input_is_named():
    z = torch.zeros(2, 3)
    for arguments, error, message in [
        ((z.long(),), TypeError, "z must be of a floating dtype, .*, got torch.int64"),
        (([1.0],), TypeError, r"z must be a tensor \(…, N\), got list"),
        ((z[:, :0],), ValueError, r"z must be \(…, N\), N at least 1, got shape \(2, 0\)"),
        ((z, "1.5"), TypeError, "alpha must be a number or a tensor, got '1.5'"),
        ((z, torch.ones(2, 1, device="meta")), ValueError, r"alpha must be on the device of z \(cpu\), got meta"),
        ((z, 1.0), ValueError, r"alpha must be above 1 \(where it is softmax\) and at most 2, got 1.0"),
        ((z, 2.5), ValueError, "at most 2, got 2.5"),
        ((z, torch.full((3,), 1.5)), ValueError, r"alpha must broadcast to \(2, 1\), got \(3,\)"),
        ((z, torch.ones(2, 1).int()), TypeError, "alpha must be of a floating dtype, got torch.int32"),
    ]:
        with pytest.raises(error, match=message):
            entmax(*arguments)
