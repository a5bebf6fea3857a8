from torch import Tensor

from .._backends import choose, observed, public_operator, remembered
from .._checking import check_tensors, check_whole, pair
from .._layout import span, too_large
from . import pooled, reference

MOST_REGIONS = 256  # whose affinities registers hold

__all__ = ["region_means", "region_routes"]


@public_operator
def region_means(x: Tensor, regions: tuple[int, int], backend: str | None = None) -> Tensor:
    """Mean over every region of a map, over the positions that lie on the map.

    The grid has `regions` = (rows, columns) regions of ⌈H/rows⌉ × ⌈W/columns⌉ positions; those at the bottom and on the
    right may reach over the edge. A region wholly outside has mean 0.

    Args:
        x: (B, H, W, C), any floating dtype.
        backend: "reference" (by index), "pooled" or "pytorch" (by average pooling), "triton"; default what suits the device, see
            `zoo.kernels`.

    Returns:
        (B, rows·columns, C), regions row by row.
    """
    regions = pair("region_means", "regions", regions)
    seen = observed((x, backend))
    return _means(_chosen_means(seen, x, regions, backend), seen, x, regions)


def _means(chosen: str, seen: bool, x: Tensor, regions: tuple[int, int]) -> Tensor:
    if chosen == "triton":
        from . import triton
        return triton.call_means(seen, x, list(regions))
    return {"reference": reference, "pooled": pooled}[chosen].region_means(x, regions)


def _choose_means(x: Tensor, regions: tuple[int, int], backend: str | None) -> str:
    check_tensors("region_means", x=(x, "B, H, W, C"))
    check_whole("region_means", "regions", 1, *regions)
    return choose("region_means", backend, x, lambda: "pooled", unsupported={"triton": lambda: too_large(span(x))})


_chosen_means = remembered(_choose_means)


@public_operator
def region_routes(
    q: Tensor, k: Tensor, regions: tuple[int, int], topk: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The regions that every query region attends to: top-k of the affinity of region means (BiFormer, arXiv 2303.08810, eqs. 3–5).

        A = mean(q) mean(k)ᵀ,  routes = topk(A)

    Regions that lie wholly outside the map have affinity −∞: they are picked only when fewer than `topk` others exist.

    Args:
        q: (B, H, W, C); k: (B, Hk, Wk, C), of q's dtype; the grid of both is `regions` = (rows, columns), see `region_means`.
        topk: 1 … rows·columns.
        backend: as for `region_means`. The kernel that chooses takes up to 256 regions.

    Returns:
        routes: (B, rows·columns, topk) int64, most attended first; scores: their affinity, in q's dtype, differentiable.
        Nothing larger than regions × regions is held, by the kernel not even that.

    Raises:
        ValueError, TypeError: arguments that do not fit together, or a `topk` beyond the number of regions.
    """
    regions = pair("region_routes", "regions", regions)
    seen = observed((q, k, topk, backend))
    chosen, *of_means = _chosen_routes(seen, q, k, regions, topk, backend)
    q_means, k_means = (_means(name, seen, x, regions) for name, x in zip(of_means, (q, k), strict=True))
    if chosen == "triton":
        from . import triton
        scores, routes = triton.call_routes(seen, q_means, k_means, list(k.shape[1:3]), list(regions), topk)
        return routes, scores
    return {"reference": reference, "pooled": pooled}[chosen].region_routes(q_means, k_means, k.shape[1:3], regions, topk)


@remembered
def _chosen_routes(q: Tensor, k: Tensor, regions: tuple[int, int], topk: int, backend: str | None) -> tuple[str, str, str]:
    """What chooses, and what takes the means of q and of k."""
    check_tensors("region_routes", q=(q, "B, H, W, C"), k=(k, "B, H, W, C"))
    check_whole("region_routes", "regions", 1, *regions)
    check_whole("region_routes", "topk", 1, topk)
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"region_routes: k must have q's batch and channels, got {tuple(k.shape)} for q {tuple(q.shape)}")
    if not 1 <= topk <= regions[0] * regions[1]:
        raise ValueError(f"region_routes: topk must be 1 to {regions[0] * regions[1]} (the number of regions), got {topk}")
    count = regions[0] * regions[1]
    too_many = None if count <= MOST_REGIONS else f"the kernel takes at most {MOST_REGIONS} regions, not {count}"
    chosen = choose("region_routes", backend, q, lambda: "pooled", unsupported={"triton": lambda: too_many})
    q_means, k_means = (_choose_means(x, regions, backend) for x in (q, k))
    return chosen, q_means, k_means
