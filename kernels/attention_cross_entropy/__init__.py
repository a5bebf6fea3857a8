from torch import Tensor

from .._backends import choose, public_operator
from .._checking import check_number, check_tensors
from . import blocked, reference

__all__ = ["attention_cross_entropy"]


@public_operator
def attention_cross_entropy(
    q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """How far linear attention is from softmax attention: the mean over images, heads and queries of their cross entropy.

        out = - mean_i Σ_j softmax(scale · q kᵀ)_ij ln a_ij,  a_ij = φ_i·φ_j / (Σ_j φ_i·φ_j + 1e-12),  φ_i of queries, φ_j of keys

    The loss by which Hedgehog's features learn (arXiv 2402.04347), of which softmax attention is the teacher.

    Args:
        q: (B, heads, N, d); k: (B, heads, M, d). Detach them for a teacher that stays.
        of_q: φ of queries, (B, heads, N, F), positive; of_k: of keys, (B, heads, M, F). Any floating dtypes; computed in at least
            float32.
        scale: default d^-0.5.
        backend: "reference" (all rows at once), "blocked" or "pytorch" (of some queries at a time, the default), see `zoo.kernels`.

    Returns:
        A scalar of at least float32, differentiable any number of times in all four.

    By default rows are made for some queries at a time and again in the backward pass: memory beyond the arguments is
    O(B · heads · (N + M) · (d + F)).

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    check_tensors("attention_cross_entropy", ("of_q", "of_k"), q=(q, "B, heads, N, d"), k=(k, "B, heads, M, d"),
                  of_q=(of_q, "B, heads, N, F"), of_k=(of_k, "B, heads, M, F"))
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError("attention_cross_entropy: q and k must differ in tokens only, "
                         f"got {tuple(q.shape)} and {tuple(k.shape)}")
    for name, x, other in (("of_q", of_q, q), ("of_k", of_k, k)):
        if x.shape[:3] != other.shape[:3]:
            raise ValueError(f"attention_cross_entropy: {name} must be (B, heads, tokens, F) with those of {name[3:]} "
                             f"{tuple(other.shape)}, got {tuple(x.shape)}")
    if of_q.shape[3] != of_k.shape[3]:
        raise ValueError(f"attention_cross_entropy: of_k must be as wide as of_q {tuple(of_q.shape)}, got {tuple(of_k.shape)}")
    check_number("attention_cross_entropy", "scale", scale)
    chosen = choose("attention_cross_entropy", backend, q, lambda: "blocked")
    return {"reference": reference, "blocked": blocked}[chosen].attention_cross_entropy(
        q, k, of_q, of_k, q.shape[-1] ** -0.5 if scale is None else scale)
