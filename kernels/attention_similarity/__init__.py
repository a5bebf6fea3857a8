from torch import Tensor

from .._backends import choose, public_operator
from .._checking import check_number, check_tensors
from . import blocked, reference

__all__ = ["attention_similarity"]


@public_operator
def attention_similarity(
    q: Tensor, k: Tensor, threshold: float = 2.0, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """How alike the attention of different queries is (arXiv 2303.11126, section 3.2): the mean of their cosine similarity.

        A = mean_heads softmax(scale · q kᵀ), rows aᵢ;  m = mean_i aᵢ;  t(a) = a where a > threshold / M, 0 elsewhere
        out = mean_i ⟨t(aᵢ), t(m)⟩ / (|t(aᵢ)| |t(m)|),  0 for a row of which nothing is left

    Args:
        q: (B, heads, N, d); k: (B, heads, M, d). float32, float64, float16, bfloat16; computed in at least float32.
        threshold: in units of 1/M, the weight of uniform attention; at least 0.
        scale: default d^-0.5.
        backend: "reference" (the attention of all queries at once), "blocked" or "pytorch" (of some at a time, the default), see
            `zoo.kernels`.

    Returns:
        The mean over images and queries, a scalar in [0, 1] of at least float32. Differentiable any number of times in q and k.

    By default attention is made for some queries at a time and again in the backward pass: memory beyond the arguments is
    O(B · heads · (N + M) · d).

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    check_tensors("attention_similarity", q=(q, "B, heads, N, d"), k=(k, "B, heads, M, d"))
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention_similarity: q and k must differ in tokens only, got {tuple(q.shape)} and {tuple(k.shape)}")
    check_number("attention_similarity", "threshold", threshold)
    if threshold is None or threshold < 0:
        raise ValueError(f"attention_similarity: threshold must be at least 0, got {threshold}")
    check_number("attention_similarity", "scale", scale)
    chosen = choose("attention_similarity", backend, q, lambda: "blocked")
    return {"reference": reference, "blocked": blocked}[chosen].attention_similarity(
        q, k, threshold, q.shape[-1] ** -0.5 if scale is None else scale)
