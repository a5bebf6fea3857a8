"""HiLo attention (LITv2, arXiv 2205.13213)."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels._exporting import known
from zoo.kernels._regions import cut, paste, positions

from ._attention import attend, attention
from ._capture import report
from ._linear import linear
from ._spatial import crop, pad_to_multiple
from ._tracing import notrace_module


@notrace_module
class HiLoAttention(nn.Module):
    """Multi-head attention whose heads look at high or at low frequencies (arXiv 2205.13213, section 3.2).

    Hi-Fi heads attend within windows of s × s positions, Lo-Fi heads from every position to the means of the windows:

        hi = proj_h(softmax(Q Kᵀ / √d) V) in every window,  lo = proj_l(softmax(Q K̄ᵀ / √d) V̄),  K̄, V̄ of avgpool_s(X)
        out = [hi, lo]

    (B, H, W, C) → (B, H, W, C), any height and width, any floating dtype. `zoo.capture` gets the attention of either kind of
    heads, `hi` (B, heads, windows, s², s²) and `lo` (B, heads, H·W, windows), windows in reading order.

    Args:
        dim: C.
        num_heads: divides `dim`.
        window: s. With 1 all heads are Lo-Fi heads, which is ordinary attention, whatever `alpha`.
        alpha: α in [0, 1], share of Lo-Fi heads: ⌊α · num_heads⌋ of them.
        qkv_bias: bias of the query, key and value projections.
        mask_padding: where windows overhang the map, True leaves the overhang out of attention and means; False pads with zeros,
            whose projections take part, as the authors' detectors and segmentors do (detection/mmdet/models/backbones/litv2.py).
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (ziplab/LITv2, hilo.py): masked padding, and no dropout.

    Raises:
        ValueError: arguments outside what is said above, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, window: int = 2, alpha: float = 0.5, qkv_bias: bool = True, mask_padding: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be 0 to 1, got {alpha}")
        self.dim, self.window, self.mask_padding = dim, window, mask_padding
        self.lo_heads = num_heads if window == 1 else int(num_heads * alpha)
        self.hi_heads = num_heads - self.lo_heads
        hi, lo = (heads * (dim // num_heads) for heads in (self.hi_heads, self.lo_heads))
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        if hi:
            self.hi_qkv, self.hi_proj = nn.Linear(dim, 3 * hi, bias=qkv_bias, **dd), nn.Linear(hi, hi, **dd)
        if lo:
            self.lo_q, self.lo_kv = (nn.Linear(dim, width, bias=qkv_bias, **dd) for width in (lo, 2 * lo))
            self.lo_proj = nn.Linear(lo, lo, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"HiLoAttention: x must be (B, H, W, {self.dim}), got shape {tuple(x.shape)}")
        branches = ([self._hi(x)] if self.hi_heads else []) + ([self._lo(x)] if self.lo_heads else [])
        return torch.cat(branches, -1) if len(branches) > 1 else branches[0]

    def _padded(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x.permute(0, 3, 1, 2), self.window).permute(0, 2, 3, 1)

    def _hi(self, x: Tensor) -> Tensor:
        padded, size = self._padded(x), (self.window, self.window)
        grid = [n // self.window for n in padded.shape[1:3]]
        q, k, v = cut(linear(self.hi_qkv, padded), grid, size, 3 * self.hi_heads).chunk(3, 1)  # (B, heads, windows, s², d)
        overhang = self.mask_padding and not known(n == own for n, own in zip(padded.shape, x.shape, strict=True))
        mask = (positions(*x.shape[1:3], regions=grid, size=size, device=x.device) >= 0)[:, None] if overhang else None
        report(self, hi=lambda: attention(q, k, mask))
        out = paste(attend(q, k, v, mask), grid, size)
        out = crop(out.permute(0, 3, 1, 2), x.shape[1:3], by_index=True).permute(0, 2, 3, 1)
        return linear(self.hi_proj, out)

    def _lo(self, x: Tensor) -> Tensor:
        means = x
        if self.window > 1:  # that of an overhanging window is of what lies on the map
            source = x if self.mask_padding else self._padded(x)
            means = F.avg_pool2d(source.permute(0, 3, 1, 2), self.window, ceil_mode=True).permute(0, 2, 3, 1)
        q, k, v = (self._heads(y) for y in (linear(self.lo_q, x), *linear(self.lo_kv, means).chunk(2, -1)))
        report(self, lo=lambda: attention(q, k))
        return linear(self.lo_proj, attend(q, k, v).transpose(1, 2).reshape(*x.shape[:3], self.lo_proj.in_features))

    def _heads(self, y: Tensor) -> Tensor:
        b, height, width, c = y.shape
        return y.reshape(b, height * width, self.lo_heads, c // self.lo_heads).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, window={self.window}, hi_heads={self.hi_heads}, lo_heads={self.lo_heads}"
