"""Bi-level routing attention (BiFormer, arXiv 2303.08810)."""
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import region_means, region_routes, routing_attention
from zoo.kernels._exporting import is_exporting
from zoo.kernels._regions import pad_to_grid, region_size
from zoo.kernels.routing_attention.reference import attention

from ._capture import report
from ._linear import linear
from ._spatial import crop
from ._tracing import notrace_module

KVPool = Literal["identity", "avg", "max", "adaptive_avg", "adaptive_max"]


def _ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉ of positive numbers, without the negative ones that ONNX would divide towards zero."""
    return (a + b - 1) // b


@notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Attention of every region over the few regions that matter to it (arXiv 2303.08810, section 3.2, algorithm 1).

    The map is cut into a grid of regions. Between the means of their queries and keys the `topk` best regions are chosen
    for every region, without gradient; every query of the region attends to all keys of the chosen ones; a depthwise
    convolution of the values (local context enhancement) is added before the output projection:

        routes = topk(mean(Q) mean(K)ᵀ),  out = proj(softmax(scale · Q K[routes]ᵀ) V[routes] + dwconv(V))

    (B, H, W, C) → (B, H, W, C), any height and width, any floating dtype. `zoo.capture` gets `routes` (B, rows·columns, topk),
    the regions in reading order, most attended first; their `affinity`, of that shape; and `attention` (B, rows·columns,
    num_heads, positions of a region, topk · positions of a routed region), rows summing to one.

    Args:
        dim: C.
        num_heads: divides `dim` and `qk_dim`.
        regions: grid of regions, one number or (rows, columns); region sizes follow the map.
        topk: regions routed to, 1 to rows·columns.
        qk_dim: width of queries and keys, default `dim`.
        scale: of the scores, default qk_dim^-0.5 as in the authors' code (not per head).
        lepe_kernel: size of the depthwise convolution, odd; 0 leaves it out.
        kv_pool: "identity"; "avg" and "max" pool the keys and values of every region by `kv_pool_size` (kernel and stride;
            the remainder is dropped); "adaptive_avg" and "adaptive_max" pool every region to `kv_pool_size`² of them. All but
            "identity" are exported for fixed sizes only.
        kv_pool_size: see `kv_pool`.
        soft_routing: multiplies routed keys and values by the softmax of their regions' affinity.
        differentiable_routing: lets the gradient into that affinity; needs `soft_routing`, the only way it reaches the output.
        learned_routing: a linear layer over the region means of queries and keys; needs `differentiable_routing` to learn.
        mask_padding: where the grid does not divide the map, True leaves the overhanging part out of routing, pooling and
            attention; False pads the input with zeros whose projections take part in everything, as the authors do.
        qkv_bias: bias of the query, key and value projection.
        out_proj: False leaves the output projection out.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (rayleizhu/BiFormer, ops/bra_legacy.py): masked padding, rectangular grids, average and max pooling
    of regions smaller than the window (they pool to one), and no copies of keys and values (see `zoo.kernels.routing_attention`).
    Routing that is differentiable but hard is declared there and not implemented; it does not exist here.

    Raises:
        ValueError: arguments outside what is said above, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        regions: int | tuple[int, int] = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        scale: float | None = None,
        lepe_kernel: int = 5,
        kv_pool: KVPool = "identity",
        kv_pool_size: int = 1,
        soft_routing: bool = False,
        differentiable_routing: bool = False,
        learned_routing: bool = False,
        mask_padding: bool = True,
        qkv_bias: bool = True,
        out_proj: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim, self.num_heads, self.topk = dim, num_heads, topk
        rows, columns = (regions, regions) if isinstance(regions, int) else regions
        self.regions = rows, columns
        self.qk_dim = qk_dim or dim
        self.scale = scale or self.qk_dim**-0.5
        self.kv_pool, self.kv_pool_size = kv_pool, kv_pool_size
        self.soft_routing, self.differentiable_routing, self.mask_padding = soft_routing, differentiable_routing, mask_padding
        self._check(lepe_kernel, learned_routing)

        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim, bias=qkv_bias, **dd)
        self.router = nn.Linear(self.qk_dim, self.qk_dim, **dd) if learned_routing else None
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, **dd) if lepe_kernel else None
        self.proj = nn.Linear(dim, dim, **dd) if out_proj else nn.Identity()

    def _check(self, lepe_kernel: int, learned_routing: bool) -> None:
        n_regions = self.regions[0] * self.regions[1]
        if min(self.regions) < 1:
            raise ValueError(f"regions must be at least 1, got {self.regions}")
        if self.dim % self.num_heads or self.qk_dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim ({self.dim}) and qk_dim ({self.qk_dim}), got {self.num_heads}")
        if not 1 <= self.topk <= n_regions:
            raise ValueError(f"topk must be 1 to {n_regions} (the number of regions), got {self.topk}")
        if lepe_kernel and lepe_kernel % 2 == 0 or lepe_kernel < 0:
            raise ValueError(f"lepe_kernel must be odd, or 0 for none, got {lepe_kernel}")
        if self.kv_pool not in KVPool.__args__:
            raise ValueError(f"kv_pool must be one of {', '.join(KVPool.__args__)}, got {self.kv_pool!r}")
        if self.kv_pool_size < 1:
            raise ValueError(f"kv_pool_size must be at least 1, got {self.kv_pool_size}")
        if self.differentiable_routing and not self.soft_routing:
            raise ValueError("differentiable_routing needs soft_routing: hard routing passes no gradient on")
        if learned_routing and not self.differentiable_routing:
            raise ValueError("learned_routing needs differentiable_routing: the router would never learn")

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"BiLevelRoutingAttention: x must be (B, H, W, {self.dim}), got shape {tuple(x.shape)}")
        height, width = x.shape[1:3]
        if not self.mask_padding:
            x = pad_to_grid(x, self.regions, region_size(height, width, self.regions))
        q, k, v = linear(self.qkv, x).split((self.qk_dim, self.qk_dim, self.dim), dim=-1)
        routes, weights = self._route(q, k)
        kv_size = region_size(*k.shape[1:3], regions=self.regions)
        lepe = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.lepe is not None else None
        if self.kv_pool != "identity":
            (k, kv_size), (v, _) = self._pool(k), self._pool(v)
        shared = (routes, self.regions, self.num_heads, kv_size, self.scale, weights)
        report(self, attention=lambda: attention(q, k, *shared))
        out = routing_attention(q, k, v, *shared)
        if lepe is not None:
            out = out + lepe
        if not self.mask_padding:
            out = crop(out.permute(0, 3, 1, 2), (height, width), by_index=True).permute(0, 2, 3, 1)
        return linear(self.proj, out)

    def _route(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.differentiable_routing:
            q, k = q.detach(), k.detach()
        if self.router is not None:
            q, k = (linear(self.router, self._region_map(x)) for x in (q, k))
        routes, affinity = region_routes(q, k, self.regions, self.topk)
        report(self, routes=routes, affinity=affinity)
        return routes, (affinity * self.scale).softmax(-1) if self.soft_routing else None

    def _region_map(self, x: Tensor) -> Tensor:
        """Region means as a map of the regions that hold anything, whose own regions are single positions."""
        rows, columns = (_ceil_div(n, _ceil_div(n, r)) for n, r in zip(x.shape[1:3], self.regions, strict=True))
        means = region_means(x, self.regions).unflatten(1, self.regions)
        return crop(means[:, None], (rows, columns), by_index=True)[:, 0]

    def _pool(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pools every region by itself: the map of pooled positions that cover any of `x`, and the size of its full regions."""
        b, height, width, c = x.shape
        if is_exporting() and not (isinstance(height, int) and isinstance(width, int)):
            raise ValueError(f"BiLevelRoutingAttention: kv_pool={self.kv_pool!r} can be recorded for a fixed size only, as by torch.export "
                             "without dynamic_shapes; torch.jit.trace and graphs with free sizes need kv_pool='identity'")
        (rows, columns), pooled = self.regions, self.kv_pool_size
        h, w = _ceil_div(height, rows), _ceil_div(width, columns)
        adaptive, average = self.kv_pool.startswith("adaptive"), self.kv_pool.endswith("avg")
        kernel = None if adaptive else (min(pooled, h), min(pooled, w))
        size = (pooled, pooled) if kernel is None else (h // kernel[0], w // kernel[1])
        overhang = (0, columns * w - width, 0, rows * h - height)

        def pool(maps: Tensor) -> Tensor:
            """(N, C, rows·h, columns·w) → (N, C, rows·size, columns·size), region by region."""
            n, channels = maps.shape[:2]
            parts = maps.reshape(n, channels, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, h, w)
            if kernel is None:
                parts = (F.adaptive_avg_pool2d if average else F.adaptive_max_pool2d)(parts, size)
            else:
                parts = (F.avg_pool2d if average else F.max_pool2d)(parts, kernel)
            parts = parts.reshape(n, rows, columns, channels, *size).permute(0, 3, 1, 4, 2, 5)
            return parts.reshape(n, channels, rows * size[0], columns * size[1])

        def covered(length: int, region: int, count: int, stride: int | None) -> int:
            """How many pooled positions along one side begin on the map."""
            full, rest = divmod(length, region)
            return full * count + sum((i * region // count if stride is None else i * stride) < rest for i in range(count))

        y = F.pad(x.permute(0, 3, 1, 2), overhang, value=0.0 if average else -float("inf"))
        y = pool(y)
        if average and any(overhang):
            y = y / pool(F.pad(x.new_ones(1, 1, height, width), overhang)).clamp(min=1e-6)
        y = y[:, :, : covered(height, h, size[0], kernel and kernel[0]), : covered(width, w, size[1], kernel and kernel[1])]
        return y.permute(0, 2, 3, 1), size

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, regions={self.regions}, topk={self.topk}, kv_pool={self.kv_pool}"
