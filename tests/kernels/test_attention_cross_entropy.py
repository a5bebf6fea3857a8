import pytest
import torch

from zoo.kernels import attention_cross_entropy
from zoo.kernels.attention_cross_entropy import blocked


def problem(b=2, heads=3, n=7, m=5, d=4, width=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, of_q, of_k = (torch.randn(b, heads, tokens, channels, generator=generator, dtype=torch.float64)
                        for tokens, channels in ((n, d), (m, d), (n, width), (m, width)))
    return [x.to(dtype).requires_grad_() for x in (q, k, of_q.softmax(-1), of_k.softmax(-1))]


def oracle(q, k, of_q, of_k, scale):
    """The definition, a loop over images, heads and queries."""
    total = 0
    for queries, keys, features, of_keys in zip(*(x.flatten(0, 1) for x in (q, k, of_q, of_k)), strict=True):
        for query, feature in zip(queries, features, strict=True):
            teacher = torch.stack([(scale * (query * key).sum()).exp() for key in keys])
            student = torch.stack([(feature * of_key).sum() for of_key in of_keys])
            total = total - (teacher / teacher.sum() * (student / (student.sum() + 1e-12)).log()).sum()
    return total / (q.shape[0] * q.shape[1] * q.shape[2])


@pytest.fixture(params=[1 << 18, 50], ids=["one block", "blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setitem(blocked.SCORES_AT_ONCE, "cpu", request.param)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_is_the_definition_with_gradients(backend, block_size):
    tensors = problem()
    expected, found = oracle(*tensors, 0.7), attention_cross_entropy(*tensors, 0.7, backend)
    torch.testing.assert_close((found, *torch.autograd.grad(found, tensors)), (expected, *torch.autograd.grad(expected, tensors)))


def test_keeps_no_attention():
    tensors, kept = problem(n=64, m=64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention_cross_entropy(*tensors)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_and_autocast(dtype):
    tensors = problem(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_cross_entropy(*tensors)
    expected = attention_cross_entropy(*(x.double() for x in tensors))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors), strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= max(1e-5, torch.finfo(dtype).eps) * theirs.abs().max()


def test_compiles_whole_and_is_registered_soundly():
    compiled = torch.compile(attention_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8):
        inputs = problem(n=n, m=n)
        out, expected = compiled(*inputs), attention_cross_entropy(*inputs)
        torch.testing.assert_close((out, *torch.autograd.grad(out, inputs)), (expected, *torch.autograd.grad(expected, inputs)))
    torch.library.opcheck(blocked.attention_cross_entropy_forward, (*problem(), 0.7))
