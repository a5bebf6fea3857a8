from torch import Tensor

from .._backends import choose, observed, public_operator, remembered
from .._checking import check_tensors
from .._layout import span, too_large
from . import convolved, recomputed, reference

__all__ = ["token_aware_avg_pool"]


@public_operator
def token_aware_avg_pool(x: Tensor, weights: Tensor, backend: str | None = None) -> Tensor:
    """Average pools of several sizes, mixed anew at every position (arXiv 2303.11126, section 3.1).

        out[p] = Σ_k weights[p, k] · pool_k(x)[p],  k = 0 … K - 1
        pool_0(x) = x,  pool_k(x)[p] = 1/9 Σ_{u, v ∈ {-k, 0, k}} x[p + (u, v)],  x being 0 outside the map

    Args:
        x: (B, H, W, C). float32, float64, float16, bfloat16; computed in at least float32.
        weights: (B, H, W, K) of the same dtype (under autocast: of any), K at least 1.
        backend: "reference" (pools are sums of shifted maps), "convolved" (convolutions), "recomputed" or "pytorch" (convolutions, taken
            again in the backward pass), "triton"; default what suits the device, see `zoo.kernels`.

    Returns:
        (B, H, W, C) in the dtype of x. Differentiable any number of times in x and weights; by default the backward pass takes
        the pools again, so that beyond the arguments one map is held at a time, and none by the Triton kernels. Exported graphs hold a
        convolution for every pool.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    seen = observed((x, weights, backend))
    chosen = _chosen(seen, x, weights, backend)
    if chosen == "triton":
        from . import triton
        return triton.call(seen, x, weights)
    return {"reference": reference, "convolved": convolved, "recomputed": recomputed}[chosen].token_aware_avg_pool(x, weights)


@remembered
def _chosen(x: Tensor, weights: Tensor, backend: str | None) -> str:
    check_tensors("token_aware_avg_pool", (), True, x=(x, "B, H, W, C"), weights=(weights, "B, H, W, K"))
    if weights.shape[:3] != x.shape[:3]:
        raise ValueError("token_aware_avg_pool: weights must be (B, H, W, K) with the B, H and W of x "
                         f"{tuple(x.shape)}, got {tuple(weights.shape)}")
    return choose("token_aware_avg_pool", backend, x, lambda: "recomputed", "convolved", {"triton": lambda: too_large(span(x))})
