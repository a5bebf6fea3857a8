"""The attention of TransNeXt (arXiv 2311.17132): near positions one by one and far ones in pools, at any size, in plain PyTorch."""
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from zoo.kernels._backends import in_forward_mode
from zoo.kernels._exporting import at_least, is_exporting

from ._capture import report
from ._initialization import fan_out_normal_
from ._linear import linear
from ._tracing import notrace_module
from .mixture_of_heads import MixtureOfHeads

SIDE = 3  # of the window of near positions
TEMPERATURE = 1 / 0.24
HIDDEN = 512  # of the perceptron of relative positions
PIECE = 1 << 13  # offsets whose hidden layer is made at a time where no gradients need all


class _CosineAttention(nn.Module):
    """What the two layers share: scaled queries, the bias of relative positions, gates of heads, and the last projection."""

    def __init__(
        self, dim: int, num_heads: int, pretrain_size: Sequence[int], shared_heads: int | None, active_heads: int, **dd: Any,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if len(pretrain_size) != 2 or min(pretrain_size) < 2:
            raise ValueError(f"pretrain_size must be a height and a width of at least 2, got {tuple(pretrain_size)}")
        self.dim, self.num_heads, self.pretrain_size = dim, num_heads, tuple(pretrain_size)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.cpb_fc1, self.cpb_fc2 = nn.Linear(2, HIDDEN, **dd), nn.Linear(HIDDEN, num_heads, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.router = None if shared_heads is None else MixtureOfHeads(dim, num_heads, shared_heads, active_heads, **dd)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.temperature, math.log(math.expm1(TEMPERATURE)))  # softplus of it is TEMPERATURE
        trunc_normal_(self.query_embedding, std=0.02)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"{type(self).__name__}: x must be (B, H, W, {self.dim}), got shape {tuple(x.shape)}")

    def _heads(self, y: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Queries, keys or values, (B, H, W, heads, d) each."""
        return y.unflatten(-1, (parts, self.num_heads, -1)).unbind(-3)

    def _scaled(self, q: Tensor, keys: Tensor) -> Tensor:
        """(q̂ + e) · softplus(temperature) · ln(number of keys); q (B, H, W, heads, d), `keys` broadcastable to (H, W, 1, 1)."""
        log = keys.to(_precise(self.temperature)).log().to(self.temperature.dtype)
        factor = F.softplus(self.temperature)[:, 0] * log
        return (q + self.query_embedding[:, 0]) * factor

    def _positions(self, rows: "_Cells", columns: "_Cells") -> Tensor:
        """The logits' bias (heads, H·W, pools): a perceptron of the offsets, of which each is computed once."""
        dtype, precise = self.cpb_fc1.weight.dtype, _precise(self.cpb_fc1.weight)
        distances = [axis.twice.to(precise) / 2 / (size - 1) * 8 for axis, size in zip((rows, columns), self.pretrain_size, strict=True)]
        y, x = ((r.sign() * (r.abs() + 1).log2() / 3).to(dtype) for r in distances)
        pairs = rows.index[:, None, :, None] * x.shape[0] + columns.index[:, None]  # (H, W, rows of pools, columns of pools)
        return F.embedding(pairs, self._table(y, x).flatten(0, 1)).flatten(0, 1).flatten(1, 2).permute(2, 0, 1)

    def _table(self, y: Tensor, x: Tensor) -> Tensor:
        """(rows, columns, heads) of all pairs of coordinates."""
        if is_exporting() or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._perceptron(y, x)
        return torch.cat([self._perceptron(piece, x) for piece in y.split(max(PIECE // len(x), 1))])

    def _perceptron(self, y: Tensor, x: Tensor) -> Tensor:
        pairs = torch.stack(torch.broadcast_tensors(y[:, None], x), -1)
        return self.cpb_fc2(self.cpb_fc1(pairs).relu())

    def _out(self, x: Tensor, heads: Tensor) -> Tensor:
        """`heads` (B, H, W, heads, d), gated and projected."""
        if self.router is not None:
            heads = heads * self.router(x)[..., None]
        return linear(self.proj, heads.flatten(-2).to(x.dtype))


class _Cells:
    """One axis of a map of n positions, pooled in cells as adaptive average pooling has them: p = ⌊n / ratio⌋ of them, or one.

    Distances are from positions to the middles of cells, whole or half numbers: twice them is whole.
    """

    def __init__(self, n: int, ratio: int, device: torch.device):
        least = at_least(n, ratio)
        self.n, self.count = n, least // ratio
        cell, position = torch.arange(self.count, device=device), torch.arange(n, device=device)
        self.start, self.end = cell * n // self.count, ((cell + 1) * n + self.count - 1) // self.count
        uneven = (n % ratio + ratio - 1) // ratio  # 0 where the ratio divides n, and all distances are whole, or all half; else 1
        last = 2 * least - ratio - 1  # twice the largest distance, or more where cells are larger than the ratio
        step = 2 - uneven
        self.twice = torch.arange(last * (1 + uneven) + 1, device=device) * step - last
        self.index = (2 * position[:, None] - (self.start + self.end - 1) + last) // step  # (n, p): which of `twice`
        self.position = position

    def weights(self) -> tuple[Tensor, Tensor]:
        """(p, n), 1 where a position is in a cell, and the cells' lengths (p,)."""
        return (self.position >= self.start[:, None]) & (self.position < self.end[:, None]), self.end - self.start

    def near(self) -> Tensor:
        """(n, SIDE): whether the neighbours of every position are on the map."""
        neighbour = self.position[:, None] + torch.arange(SIDE, device=self.position.device) - SIDE // 2
        return (neighbour >= 0) & (neighbour < self.n)


def _pooled(x: Tensor, rows: _Cells, columns: _Cells) -> Tensor:
    """(B, H, W, C) → (B, rows.count, columns.count, C), means of cells, as products, which export with free sizes."""
    (down, heights), (across, widths) = rows.weights(), columns.weights()
    sums = (down.to(x.dtype) @ (across.to(x.dtype) @ x).transpose(1, 2)).transpose(1, 2)
    return sums / (heights[:, None, None] * widths[:, None]).to(x.dtype)


@notrace_module
class LengthScaledAttention(_CosineAttention):
    """Cosine attention of all positions, scaled by their number (arXiv 2311.17132, equation 6): TransNeXt's last stage.

        logits = ((q̂ + e) · softplus(τ) · ln(H W)) K̂ᵀ + b, softmax, times V;  û = u / ‖u‖

    with a learned vector e and number τ per head, and b(Δrow, Δcolumn) a perceptron of the offsets' logarithms, which holds beyond the
    sizes that it was trained at. (B, H, W, C) → (B, H, W, C), any height and width, any floating dtype. `zoo.capture` gets the
    `attention` (B, heads, H·W, H·W), and of the child `router` the `gates`.

    Args:
        dim: C.
        num_heads: divides `dim`.
        pretrain_size: height and width, at least 2, of the maps of pretraining, whose offsets are of size 1 to the perceptron.
        qkv_bias: bias of the query, key and value projections.
        shared_heads, active_heads: S and k of `MixtureOfHeads`, whose gates are put on the heads; None: no gates.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (SkyworkAI/MoH, MoH-ViT/attention.py): the size is the map's, not one that the layer is built for,
    and there is no dropout.

    Raises:
        ValueError: arguments outside what is said above, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, pretrain_size: Sequence[int] = (7, 7), qkv_bias: bool = True,
        shared_heads: int | None = None, active_heads: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, num_heads, pretrain_size, shared_heads, active_heads, device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        b, h, w, _ = x.shape
        q, k, v = self._heads(linear(self.qkv, x), 3)
        positions = self._positions(_Cells(h, 1, x.device), _Cells(w, 1, x.device))
        scaled = self._scaled(F.normalize(q, dim=-1), x.new_full((), h * w, dtype=torch.int64))
        q, k, v = (y.flatten(1, 2).transpose(1, 2) for y in (scaled, F.normalize(k, dim=-1), v))
        positions = positions.to(q.dtype)
        report(self, attention=lambda: (q @ k.mT + positions).softmax(-1))
        if is_exporting() or in_forward_mode():
            out = (q @ k.mT + positions).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, positions.to(v.dtype), scale=1.0)
        return self._out(x, out.transpose(1, 2).unflatten(1, (h, w)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, pretrain_size={self.pretrain_size}"


@notrace_module
class AggregatedAttention(_CosineAttention):
    """Attention to the 3×3 neighbours and to pools of the whole map at once (arXiv 2311.17132, section 3): TransNeXt's first stages.

        logits of neighbours  (q̂ + e) · softplus(τ) · ln(n + P) · k̂_j + c_slot,  n of the 9 on the map
        logits of pools       (q̂ + e) · softplus(τ) · ln(n + P) · k̂_p + b(Δrow, Δcolumn),  keys of LayerNorm(pool(GELU(W x)))
        A = softmax over both;  out = proj(Σ_j (A_j + q̂ · t_slot + u_slot) v_j + Σ_p A_p v_p)

    with P = ⌊H / sr⌋ · ⌊W / sr⌋ pools, e, τ and b as in `LengthScaledAttention`, and learned c, t and u. (B, H, W, C) → (B, H, W, C),
    any height and width, any floating dtype. Where sr does not divide a size, pools are those of adaptive average pooling; there is at
    least one. Windows are never in memory: neighbours are the map, shifted. `zoo.capture` gets A in two parts, `neighbours` (B, heads,
    H·W, 9), 0 off the map, and `pools` (B, heads, H·W, P), and of the child `router` the `gates`.

    Args:
        dim: C.
        num_heads: divides `dim`.
        sr_ratio: sr, at least 1.
        pretrain_size, qkv_bias, shared_heads, active_heads, device, dtype: as in `LengthScaledAttention`.

    Differences from the authors' code (SkyworkAI/MoH, MoH-ViT/attention_native.py): as there; the window is of side 3, as in all of their
    models.

    Raises:
        ValueError: arguments outside what is said above, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, sr_ratio: int = 8, pretrain_size: Sequence[int] = (56, 56), qkv_bias: bool = True,
        shared_heads: int | None = None, active_heads: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, pretrain_size, shared_heads, active_heads, **dd)
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio must be at least 1, got {sr_ratio}")
        self.sr_ratio = sr_ratio
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias, **dd), nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, SIDE**2, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, SIDE**2, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, SIDE**2, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fan_out_normal_(self.sr)
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        _, h, w, _ = x.shape
        rows, columns = _Cells(h, self.sr_ratio, x.device), _Cells(w, self.sr_ratio, x.device)
        far = _pooled(F.gelu(self.sr(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1), rows, columns)
        (q,) = self._heads(linear(self.q, x), 1)
        (k, v), (far_k, far_v) = (self._heads(linear(self.kv, y), 2) for y in (x, self.norm(far)))
        q, k, far_k = (F.normalize(y, dim=-1) for y in (q, k, far_k))

        on_map = (rows.near()[:, None, :, None] & columns.near()[:, None]).flatten(2)  # (H, W, 9)
        scaled = self._scaled(q, on_map.sum(-1)[..., None, None] + rows.count * columns.count)
        near_logits = torch.stack([(scaled * y).sum(-1) for y in _shifted(k)], -1) + self.relative_pos_bias_local
        near_logits = torch.where(on_map[:, :, None], near_logits, -torch.inf)
        far_logits = _by_head(scaled) @ _by_head(far_k).mT + self._positions(rows, columns)
        attention = torch.cat([_by_head(near_logits), far_logits], -1).softmax(-1)
        near, pools = attention.split((SIDE**2, attention.shape[-1] - SIDE**2), -1)
        report(self, neighbours=near, pools=pools)

        weights = _by_head(q) @ self.learnable_tokens + self.learnable_bias + near
        out = (pools @ _by_head(far_v)).transpose(1, 2).unflatten(1, (h, w))
        slots = weights.transpose(1, 2).unflatten(1, (h, w))[..., None].unbind(-2)
        for weight, y in zip(slots, _shifted(v), strict=True):
            out = torch.addcmul(out, weight, y)
        return self._out(x, out)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, sr_ratio={self.sr_ratio}, pretrain_size={self.pretrain_size}"


def _precise(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _by_head(y: Tensor) -> Tensor:
    """(B, H, W, heads, d) → (B, heads, H·W, d)."""
    return y.flatten(1, 2).transpose(1, 2)


def _shifted(y: Tensor) -> list[Tensor]:
    """Of every position its neighbour, for the 9 of a window in reading order, 0 off the map; views of one copy. (B, H, W, heads, d)."""
    h, w = y.shape[1:3]
    padded = F.pad(y, (0, 0, 0, 0, 1, 1, 1, 1))
    return [padded.narrow(1, i, h).narrow(2, j, w) for i in range(SIDE) for j in range(SIDE)]
