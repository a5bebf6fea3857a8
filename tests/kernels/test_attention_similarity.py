import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import attention_similarity
from zoo.kernels.attention_similarity import blocked, reference


def oracle(q, k, threshold, scale):
    """The definition, a loop over images, heads and queries."""
    total = 0 * (q.sum() + k.sum())
    for queries, keys in zip(q, k, strict=True):
        rows = []
        for i in range(queries.shape[1]):
            per_head = [torch.stack([(scale * (query[i] * key).sum()).exp() for key in head])
                        for query, head in zip(queries, keys, strict=True)]
            rows.append(sum(e / e.sum() for e in per_head) / len(per_head))
        kept = [torch.where(row > threshold / len(row), row, 0) for row in (*rows, sum(rows) / len(rows))]
        *kept, mean = kept
        for row in kept:
            lengths = row.square().sum() * mean.square().sum()
            total = total + ((row * mean).sum() / lengths.sqrt() if lengths > 0 else 0)
    return total / (q.shape[0] * q.shape[2])


def problem(b=2, heads=3, n=7, m=5, d=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, heads, tokens, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for tokens in (n, m)]


@pytest.fixture(params=[1 << 18, 50], ids=["one block", "blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setitem(blocked.SCORES_AT_ONCE, "cpu", request.param)


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0, 1.5])
def test_is_the_definition_with_gradients(threshold, block_size):
    q, k = problem()
    expected = oracle(q, k, threshold, 0.5)
    expected = expected, *torch.autograd.grad(expected, (q, k))
    for similarity in (attention_similarity(q, k, threshold), reference.attention_similarity(q, k, threshold, 0.5)):
        torch.testing.assert_close((similarity, *torch.autograd.grad(similarity, (q, k))), expected)


@given(b=st.integers(1, 3), heads=st.integers(1, 3), n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 4),
       threshold=st.sampled_from([0.0, 0.6, 1.3]), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_any_shape(b, heads, n, m, d, threshold, seed):
    with torch.no_grad():
        q, k = problem(b, heads, n, m, d, seed=seed)
        found = attention_similarity(q, k, threshold, scale=2.0)
        torch.testing.assert_close(found, torch.as_tensor(oracle(q, k, threshold, 2.0), dtype=q.dtype))
        assert 0 <= found <= 1 + 1e-9


def test_gradients_in_float64(block_size):
    assert torch.autograd.gradcheck(lambda q, k: attention_similarity(q, k, 0.7), problem())


def test_identical_rows_are_entirely_alike():
    q, k = problem()
    assert attention_similarity(q[:, :, :1].expand_as(q), k, 0.0).item() == pytest.approx(1)
    assert attention_similarity(torch.zeros_like(q), k, 0.9).item() == pytest.approx(1)  # uniform attention
    assert attention_similarity(torch.zeros_like(q), k, 1.1).item() == 0  # of which nothing is left


def test_queries_that_attend_to_themselves_are_hardly_alike():
    x = 100 * torch.eye(16)[None, None]
    assert attention_similarity(x, x, 0.0, scale=1.0).item() == pytest.approx(1 / math.sqrt(16), rel=1e-5)


def test_keeps_no_attention():
    q, k = problem(2, 2, 64, 64, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention_similarity(q, k)
    assert sum(t.numel() for t in kept) == q.numel() + k.numel() + 2 * 2 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_strided_and_autocast(dtype):
    packed = torch.randn(2, 9, 2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    q, k = packed.permute(2, 0, 3, 1, 4).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_similarity(q, k, 0.5)
    expected = attention_similarity(q.double(), k.double(), 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(x, packed)[0].double() for x in (found, expected))
    assert (ours - theirs).abs().max() <= max(1e-5, torch.finfo(dtype).eps) * theirs.abs().max()


def test_compiles_whole_and_is_registered_soundly():
    compiled = torch.compile(attention_similarity, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8):
        inputs = problem(n=n, m=n)
        out, expected = compiled(*inputs), attention_similarity(*inputs)
        torch.testing.assert_close((out, *torch.autograd.grad(out, inputs)), (expected, *torch.autograd.grad(expected, inputs)))
    torch.library.opcheck(blocked.attention_similarity_forward, (*problem(), 0.7, 0.5))


def test_bad_input_is_named():
    q, k = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 6, 5)
    for arguments, error, message in [
        ((q[0], k), ValueError, r"q must be \(B, heads, N, d\), got shape \(3, 4, 5\)"),
        ((q, k.long()), TypeError, "k must be .* torch.int64"),
        ((q, k[:, :2]), ValueError, r"differ in tokens only, got \(2, 3, 4, 5\) and \(2, 2, 6, 5\)"),
        ((q, k.double()), TypeError, "k must have the dtype of q"),
        ((q, k, -1.0), ValueError, "threshold must be at least 0, got -1.0"),
    ]:
        with pytest.raises(error, match=message):
            attention_similarity(*arguments)
