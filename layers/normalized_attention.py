"""Attention of queries to keys by what stands in the place of softmax: α-entmax, sparsemax, Cog, ReLA."""
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from zoo.kernels import entmax
from zoo.kernels._backends import in_forward_mode
from zoo.kernels._exporting import is_exporting

from ._capture import report
from ._tracing import notrace_module

NORMALIZERS = ("softmax", "entmax15", "sparsemax", "entmax", "cog", "rela")
EPS = 1e-8  # of ReLA's norm, the authors'


@notrace_module
class NormalizedAttention(nn.Module):
    """A V per head, A = normalizer(Z), Z = scale · Q Kᵀ + bias: the middle of `SelfAttention`, without projections.

    (B, heads, N, d) three times → (B, heads, N, d).

    | normalizer | A | paper |
    | --- | --- | --- |
    | softmax | softmax(Z), by torch's fused attention where timm's setting lets it | |
    | entmax15, sparsemax | α-entmax of α = 1.5 and 2: exact zeros | 1905.05702 |
    | entmax | α-entmax with a learned α = 1 + sigmoid(alpha) per head | 1909.00015 |
    | cog | sign(Z) ⊙ softmax(abs(Z)): weights of both signs | 2411.07176 |
    | rela | relu(Z), and its outputs o (all heads' together) are scale ⊙ o / √(mean(o²) + 1e-8) ⊙ sigmoid(gate ⊙ o) | 2104.07012 |

    A bias of -∞ masks a key for every normalizer: its weight is 0, and so is the output of a query without any key (of softmax,
    what torch makes of it). `zoo.capture` gets the `attention` A, (B, heads, N, N).

    Args:
        num_heads, head_dim: of queries, keys and values.
        normalizer: one of the table's.
        alpha: at which "entmax" starts, between 1 (softmax, not reached) and 2 (sparsemax, not reached); default 1.5.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code: ReLA's gate starts at 0, so that sigmoid is ½, and is drawn there (bzhangGo/zero,
    modules/rela.py); a masked key gets no weight in Cog (trestad/CogAttn takes no masks).

    Raises:
        ValueError: at construction, an unknown normalizer; an alpha that is not between 1 and 2, or given to another normalizer.
    """

    def __init__(
        self, num_heads: int, head_dim: int, normalizer: str = "softmax", alpha: float | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
        if alpha is not None and (normalizer != "entmax" or not 1 < alpha < 2):
            raise ValueError(f"alpha is where normalizer 'entmax' starts, between 1 and 2, got {alpha} for {normalizer!r}")
        self.num_heads, self.head_dim, self.normalizer, self.start = num_heads, head_dim, normalizer, alpha or 1.5
        self.fused_attn = use_fused_attn()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.empty(num_heads, **dd)) if normalizer == "entmax" else None
        width = num_heads * head_dim
        self.scale = nn.Parameter(torch.empty(width, **dd)) if normalizer == "rela" else None
        self.gate = nn.Parameter(torch.empty(width, **dd)) if normalizer == "rela" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.alpha is not None:
            nn.init.constant_(self.alpha, math.log((self.start - 1) / (2 - self.start)))
        if self.scale is not None and self.gate is not None:
            nn.init.ones_(self.scale)
            nn.init.zeros_(self.gate)

    @property
    def heads_are_independent(self) -> bool:
        """Whether heads can be taken out one by one: ReLA norms all of them together."""
        return self.normalizer != "rela"

    def keep_heads(self, heads: list[int]) -> None:
        """Leaves these heads, in place."""
        self.num_heads = len(heads)
        if self.alpha is not None:
            self.alpha = nn.Parameter(self.alpha.detach()[heads], requires_grad=self.alpha.requires_grad)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None, dropout: float = 0.0,
    ) -> Tensor:
        """`bias` broadcasts to (B, heads, N, N), `scale` is d^-0.5 by default, `dropout` the share of weights that is left out."""
        scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
        if self.normalizer == "softmax" and self.fused_attn and not is_exporting() and not in_forward_mode():
            report(self, attention=lambda: self._attention(q, k, bias, scale))
            return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
        attention = self._attention(q, k, bias, scale)
        report(self, attention=attention)
        o = F.dropout(attention, dropout) @ v if dropout else attention @ v
        if self.scale is None or self.gate is None:
            return o
        norm = torch.rsqrt(o.square().mean((1, 3), keepdim=True) + EPS)
        per_channel = (y.view(self.num_heads, 1, self.head_dim) for y in (self.scale, self.gate))
        factor, gate = (y.to(o.dtype) for y in per_channel)
        return factor * o * norm * (gate * o).sigmoid()

    def _attention(self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        z = (q * scale) @ k.transpose(-2, -1)
        z = z if bias is None else z + bias.to(z.dtype)
        return self._weights()(z)

    def _weights(self) -> Callable[[Tensor], Tensor]:
        if self.alpha is not None:
            alpha = (1 + self.alpha.sigmoid()).view(-1, 1, 1)
            return lambda z: entmax(z, alpha)
        return {"softmax": _softmax, "entmax15": entmax, "sparsemax": _sparsemax, "cog": _cog, "rela": torch.relu}[self.normalizer]

    def extra_repr(self) -> str:
        return f"normalizer={self.normalizer!r}"


def _softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


def _sparsemax(z: Tensor) -> Tensor:
    return entmax(z, 2.0)


def _cog(z: Tensor) -> Tensor:
    masked = z <= torch.finfo(z.dtype).min / 2  # -∞, or the least number in its place: neither may count by its size
    z = torch.where(masked, 0, z)
    attention = z.sign() * torch.where(masked, torch.finfo(z.dtype).min, z.abs()).softmax(-1)
    return torch.where(masked, 0, attention)
