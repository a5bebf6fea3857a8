from torch import Tensor

from .._backends import choose, observed, public_operator, remembered
from .._layout import span, too_large
from .._regions import check_map, check_regions, region_size, settled
from . import blocked, dense, reference

__all__ = ["routing_attention"]

WIDEST_HEAD, MOST_POSITIONS = 128, 1 << 20  # that the Triton kernels take
DENSE_KEYS = 256  # up to this many keys the dense backend is the fastest in PyTorch
DENSE_SHARE, DENSE_REGION = 4, 16  # so it is where a quarter of all regions is routed, of at most 16 positions each


@public_operator
def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    regions: tuple[int, int],
    num_heads: int,
    kv_size: tuple[int, int] | None = None,
    scale: float | None = None,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query region over the key and value regions it is routed to (BiFormer, arXiv 2303.08810, eqs. 6–7).

        out_i = softmax(scale · q_i [w_ij k_j]ᵀ_{j ∈ routes(i)}) [w_ij v_j]_{j ∈ routes(i)},  per head

    Maps are cut into a grid of `regions` = (rows, columns) regions. Those at the bottom and on the right may reach over
    the edge of the map; what lies outside is attended by nobody. A region routed only to empty regions gives 0.

    Args:
        q: (B, H, W, C), regions of ⌈H/rows⌉ × ⌈W/columns⌉ positions.
        k: (B, Hk, Wk, C); v: (B, Hk, Wk, Cv), regions of `kv_size` positions (default: as for q, from Hk and Wk).
            Widths are divisible by `num_heads`. float32, float64, float16, bfloat16; the softmax is at least float32.
        routes: (B, rows·columns, n) int64, the routed regions, see `region_routes`. No region twice.
        scale: default (C / num_heads)^-0.5.
        weights: (B, rows·columns, n), the factors w of the routed keys and values; default 1.
        backend: "reference" (every query region beside copies of its keys and values), "dense" (over the whole map, masked; without
            weights), "blocked" (some query regions at a time), "pytorch" (the fastest of these), "triton"; default what suits the
            device, see `zoo.kernels`. The Triton kernels take float32, float16 and bfloat16, heads of at most 128 channels, q, k and v
            of one dtype, and at most 2^20 routes, routed positions and positions of the map.

    Returns:
        (B, H, W, Cv). Differentiable any number of times in q, k, v and weights.

    By default keys and values are never copied for all regions at once, and the attention is not kept for the backward pass: memory
    beyond the arguments is O(B·H·W·C); the Triton kernels copy no keys and values at all. Results and gradients are
    deterministic. Exported graphs hold the plain gather instead.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    regions = (regions[0], regions[1])
    of_keys = region_size(*k.shape[1:3], regions=regions) if kv_size is None else (kv_size[0], kv_size[1])
    seen = observed((q, k, v, routes, num_heads, scale, weights, backend))
    chosen = _chosen(seen, q, k, v, routes, regions, num_heads, of_keys, weights, backend)
    scale = (q.shape[-1] // num_heads) ** -0.5 if scale is None else float(scale)
    arguments = q, k, v, routes, regions, num_heads, of_keys, scale, weights
    if chosen == "triton":
        from . import triton
        return triton.call(seen, *arguments)[0]
    return {"reference": reference, "dense": dense, "blocked": blocked}[chosen].routing_attention(*arguments)


@remembered
def _chosen(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int], num_heads: int, of_keys: tuple[int, int],
    weights: Tensor | None, backend: str | None,
) -> str:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_map(name, "routing_attention", x)
        if x.shape[-1] % num_heads:
            raise ValueError(f"routing_attention: num_heads must divide the channels of {name} ({x.shape[-1]}), got {num_heads}")
    check_regions("routing_attention", regions)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"routing_attention: k must have the channels of q ({q.shape[-1]}), got {k.shape[-1]}")
    if v.shape[:3] != k.shape[:3] or k.shape[0] != q.shape[0]:
        raise ValueError(f"routing_attention: q, k, v must share the batch, k and v the map, got {[tuple(x.shape) for x in (q, k, v)]}")
    if routes.ndim != 3 or routes.shape[:2] != (q.shape[0], regions[0] * regions[1]):
        raise ValueError(f"routing_attention: routes must be (B, rows·columns, n) = ({q.shape[0]}, {regions[0] * regions[1]}, n), "
                         f"got {tuple(routes.shape)}")
    if weights is not None and weights.shape != routes.shape:
        raise ValueError(f"routing_attention: weights must have the shape of routes {tuple(routes.shape)}, got {tuple(weights.shape)}")
    return choose("routing_attention", backend, q, lambda: _fastest(k, routes, regions, of_keys, weights), unsupported={
        "triton": lambda: _unsupported(q, k, v, routes, regions, num_heads, of_keys),
        "dense": lambda: None if weights is None else "it takes no weights"})


def _fastest(k: Tensor, routes: Tensor, regions: tuple[int, int], kv_size: tuple[int, int], weights: Tensor | None) -> str:
    if not settled(*k.shape[1:3], regions=regions, size=kv_size):
        return "blocked"
    few_keys = k.shape[1] * k.shape[2] <= DENSE_KEYS
    most_routed = regions[0] * regions[1] <= DENSE_SHARE * routes.shape[-1] and kv_size[0] * kv_size[1] <= DENSE_REGION
    return "dense" if weights is None and (few_keys or most_routed) else "blocked"


def _unsupported(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int], num_heads: int, kv_size: tuple[int, int]
                 ) -> str | None:
    """What the Triton kernels cannot do with these arguments."""
    if not q.dtype == k.dtype == v.dtype:
        return f"the kernels take q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    widest = max(q.shape[-1], v.shape[-1]) // num_heads
    if widest > WIDEST_HEAD:
        return f"the kernels take heads of at most {WIDEST_HEAD} channels, not {widest}"
    (_, height, width, _), (_, count, slots), own = q.shape, routes.shape, region_size(*q.shape[1:3], regions=regions)
    most = max(k.shape[1] * k.shape[2], count * own[0] * own[1], count * slots, slots * kv_size[0] * kv_size[1])
    if most > MOST_POSITIONS:
        return f"the kernels take at most {MOST_POSITIONS} positions, not {most}"
    return too_large(span(q), span(k), span(v), height * width * v.shape[3])
