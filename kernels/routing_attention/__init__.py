import torch
from torch import Tensor

from .._backends import choose, observed, public_operator, remembered
from .._checking import check_number, check_tensors, check_whole, pair
from .._layout import span, too_large
from .._regions import check_routes, region_size, settled
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
    the edge of the map; what lies outside is attended by nobody. A region routed only to empty regions gives 0. NaN and infinity
    reach what is routed to them and nothing else, in the gradients too; but for the dense backend in compiled graphs, and for what
    of them its incoming gradient holds.

    Args:
        q: (B, H, W, C), regions of ⌈H/rows⌉ × ⌈W/columns⌉ positions.
        k: (B, Hk, Wk, C); v: (B, Hk, Wk, Cv), regions of `kv_size` positions (default: as for q, from Hk and Wk).
            The grid covers the map. Widths are divisible by `num_heads`. float32, float64, float16, bfloat16; the softmax is at
            least float32.
        routes: (B, rows·columns, n) int64, the routed regions, see `region_routes`: 0 to rows·columns − 1, none twice for the same
            region. Of other values the CPU raises, except in compiled graphs of the dense backend. GPUs do not ask: there the Triton
            kernels leave out what is no region, and what comes twice counts once or twice; they touch no other memory.
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
    regions = pair("routing_attention", "regions", regions)
    kv_size = None if kv_size is None else pair("routing_attention", "kv_size", kv_size)
    seen = observed((q, k, v, routes, num_heads, scale, weights, backend))
    chosen, of_keys = _chosen(seen, q, k, v, routes, regions, num_heads, kv_size, scale, weights, backend)
    factor = (q.shape[-1] // num_heads) ** -0.5 if scale is None else float(scale)
    arguments = q, k, v, routes, regions, num_heads, of_keys, factor, weights
    if not seen and chosen != "blocked":
        check_routes("routing_attention", routes, regions[0] * regions[1])
    if chosen == "triton":
        from . import triton
        return triton.call(seen, *arguments)[0]
    out = {"reference": reference, "dense": dense, "blocked": blocked}[chosen].routing_attention(*arguments)
    if chosen == "dense" and not seen and out.device.type == "cpu" and out.isnan().any():
        return blocked.routing_attention(*arguments)  # NaN times 0 may have reached what does not attend to it
    return out


@remembered
def _chosen(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int], num_heads: int, kv_size: tuple[int, int] | None,
    scale: float | None, weights: Tensor | None, backend: str | None,
) -> tuple[str, tuple[int, int]]:
    """The backend, and the size of key regions."""
    check_tensors("routing_attention", ("weights",), True, q=(q, "B, H, W, C"), k=(k, "B, H, W, C"), v=(v, "B, H, W, C"),
                  weights=(weights, "B, regions, n?"))
    check_whole("routing_attention", "regions", 1, *regions)
    check_whole("routing_attention", "num_heads", 1, num_heads)
    check_number("routing_attention", "scale", scale)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[-1] % num_heads:
            raise ValueError(f"routing_attention: num_heads must divide the channels of {name} ({x.shape[-1]}), got {num_heads}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"routing_attention: k must have the channels of q ({q.shape[-1]}), got {k.shape[-1]}")
    if v.shape[:3] != k.shape[:3] or k.shape[0] != q.shape[0]:
        raise ValueError(f"routing_attention: q, k, v must share the batch, k and v the map, got {[tuple(x.shape) for x in (q, k, v)]}")
    if not isinstance(routes, Tensor) or routes.dtype != torch.int64:
        raise TypeError(f"routing_attention: routes must be a tensor of int64, got {getattr(routes, 'dtype', repr(routes))}")
    if routes.device != q.device:
        raise ValueError(f"routing_attention: routes must be on the device of q ({q.device}), got {routes.device}")
    count = regions[0] * regions[1]
    if routes.ndim != 3 or routes.shape[:2] != (q.shape[0], count) or routes.shape[2] < 1:
        raise ValueError(f"routing_attention: routes must be (B, rows·columns, n) = ({q.shape[0]}, {count}, n), got {tuple(routes.shape)}")
    if kv_size is None:
        of_keys = region_size(*k.shape[1:3], regions=regions)
    else:
        check_whole("routing_attention", "kv_size", 1, *kv_size)
        of_keys = kv_size
        covered = regions[0] * of_keys[0], regions[1] * of_keys[1]
        if k.shape[1] > covered[0] or k.shape[2] > covered[1]:
            raise ValueError(f"routing_attention: k must have at most {covered[0]}×{covered[1]} positions, {regions} regions of "
                             f"{of_keys}, got {k.shape[1]}×{k.shape[2]}")
    if weights is not None and weights.shape != routes.shape:
        raise ValueError(f"routing_attention: weights must have the shape of routes {tuple(routes.shape)}, got {tuple(weights.shape)}")
    return choose("routing_attention", backend, q, lambda: _fastest(k, routes, regions, of_keys, weights), unsupported={
        "triton": lambda: _unsupported(q, k, v, routes, regions, num_heads, of_keys),
        "dense": lambda: None if weights is None else "it takes no weights"}), of_keys


def _fastest(k: Tensor, routes: Tensor, regions: tuple[int, int], kv_size: tuple[int, int], weights: Tensor | None) -> str:
    if not settled(*k.shape[1:3], regions=regions, size=kv_size):
        return "blocked"
    few_keys = k.shape[1] * k.shape[2] <= DENSE_KEYS
    most_routed = regions[0] * regions[1] <= DENSE_SHARE * routes.shape[-1] and kv_size[0] * kv_size[1] <= DENSE_REGION
    return "dense" if weights is None and (few_keys or most_routed) else "blocked"


def _unsupported(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int], num_heads: int, kv_size: tuple[int, int]
                 ) -> str | None:
    """What the Triton kernels cannot do with these arguments."""
    if not q.dtype == k.dtype == v.dtype:  # as autocast has it
        return f"the kernels take q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    widest = max(q.shape[-1], v.shape[-1]) // num_heads
    if widest > WIDEST_HEAD:
        return f"the kernels take heads of at most {WIDEST_HEAD} channels, not {widest}"
    (_, height, width, _), (_, count, slots), own = q.shape, routes.shape, region_size(*q.shape[1:3], regions=regions)
    most = max(k.shape[1] * k.shape[2], count * own[0] * own[1], count * slots, slots * kv_size[0] * kv_size[1])
    if most > MOST_POSITIONS:
        return f"the kernels take at most {MOST_POSITIONS} positions, not {most}"
    return too_large(span(q), span(k), span(v), height * width * v.shape[3])
