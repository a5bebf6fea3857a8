"""Mixture-of-head attention (MoH, arXiv 2410.11842): every token picks the heads that it listens to."""
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module
from .normalized_attention import NormalizedAttention


@notrace_module
class MixtureOfHeads(nn.Module):
    """The gates of attention's heads, one number per token and head, 0 for the heads that the token does not pick.

    Of H heads the first S, shared, are active for every token, and k of the other E = H - S, those with the k largest scores:

        p = softmax(W_r x) over the E heads, m = 1 for the k largest, else 0
        shared gates  s = S · softmax(W_s x)          of one shared head: 1
        routed gates  r = k · p m / Σ p m
        gates = [α₁ s, α₂ r], α = 2 · softmax(W_h x); without shared, or routed, heads r, or s, alone

    (…, dim) → (…, H), any floating dtype. A head's output is multiplied by its gate before attention's last projection. Gates are 1 on
    average over the active heads of either kind. `zoo.capture` gets the `gates`; `zoo.LoadBalancingLoss` keeps tokens from picking
    the same heads.

    Args:
        dim: channels of the tokens.
        num_heads: H.
        shared_heads: S.
        active_heads: k, 1 to E; 0 where all heads are shared.
        device, dtype: of the parameters, as in torch.

    W_s and W_h start at 0, so that shared gates are 1 and α is: what is put into trained attention only lacks the heads that are left
    out. With k = 1 the routed gate is 1, and W_r learns from the balance loss alone.

    Differences from the paper: those of the authors' code (SkyworkAI/MoH, MoH-DiT/models.py), which renormalises over the picked heads and
    has the factors S, k and 2. Unlike there, no loss is kept anywhere.

    Raises:
        ValueError: at construction, numbers of heads outside what is said above.
    """

    def __init__(
        self, dim: int, num_heads: int, shared_heads: int, active_heads: int,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        routed = num_heads - shared_heads
        if not 0 <= shared_heads <= num_heads:
            raise ValueError(f"shared_heads must be 0 to num_heads ({num_heads}), got {shared_heads}")
        if not min(1, routed) <= active_heads <= routed:
            allowed = f"1 to {routed}, the heads that are not shared" if routed else "0, as all heads are shared"
            raise ValueError(f"active_heads must be {allowed}, got {active_heads}")
        self.num_heads, self.shared_heads, self.active_heads = num_heads, shared_heads, active_heads
        self.take_scores: Callable[[Tensor], None] | None = None  # of a loss, while it runs the network; hooks could not be compiled
        dd: dict[str, Any] = dict(bias=False, device=device, dtype=dtype)
        self.shared = nn.Linear(dim, shared_heads, **dd) if shared_heads > 1 else None
        self.routed = nn.Linear(dim, routed, **dd) if routed else None
        self.kinds = nn.Linear(dim, 2, **dd) if shared_heads and routed else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for router in (self.shared, self.kinds):
            if router is not None:
                nn.init.zeros_(router.weight)
        if self.routed is not None:
            trunc_normal_(self.routed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        gates = []
        if self.shared is not None:
            gates.append(self.shared_heads * self.shared(x).softmax(-1))
        elif self.shared_heads:
            gates.append(x.new_ones(()).expand(*x.shape[:-1], 1))
        if self.routed is not None:
            scores = self.routed(x)
            if self.take_scores is not None:
                self.take_scores(scores)
            p, picked = self.picked(scores)
            weight = p * picked
            gates.append(self.active_heads * weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps))
        if self.kinds is not None:
            alpha = 2 * self.kinds(x).softmax(-1)
            gates = [gate * alpha[..., i, None] for i, gate in enumerate(gates)]
        out = torch.cat(gates, -1).to(x.dtype) if len(gates) > 1 else gates[0].to(x.dtype)
        report(self, gates=out)
        return out

    def picked(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """p and m of W_r x."""
        p = scores.softmax(-1)
        return p, torch.zeros_like(p).scatter(-1, p.detach().topk(self.active_heads, -1).indices, 1.0)

    def balance(self, scores: Tensor) -> Tensor:
        """How unevenly tokens pick heads, of W_r x (…, E): E Σ P_e f_e, the means over all tokens of p and m. From k to E, at least 1."""
        p, picked = self.picked(scores.to(torch.promote_types(scores.dtype, torch.float32)))
        return p.shape[-1] * (p.flatten(0, -2).mean(0) * picked.flatten(0, -2).mean(0)).sum()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, shared_heads={self.shared_heads}, active_heads={self.active_heads}"


@notrace_module
class MixtureOfHeadAttention(NormalizedAttention):
    """Softmax attention whose heads have the gates of `MixtureOfHeads`: the middle of `SelfAttention`, without projections.

    (B, heads, N, d) three times and the tokens (B, N, dim) → (B, heads, N, d). In the place of a vision transformer's own by
    `zoo.replace_attention(vit, "moh")`. `zoo.capture` gets the `attention`, and of the child `router` the `gates`.

    Args:
        num_heads, head_dim: of queries, keys and values.
        dim: channels of the tokens.
        shared_heads: default a quarter of the heads, at least one.
        active_heads: of the others, for every token; default two thirds of them, so that of twelve heads nine are active.
        device, dtype: of the parameters, as in torch.

    Raises:
        ValueError: at construction, numbers of heads that `MixtureOfHeads` refuses.
    """

    takes_tokens = True

    def __init__(
        self, num_heads: int, head_dim: int, dim: int, shared_heads: int | None = None, active_heads: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__(num_heads, head_dim, device=device, dtype=dtype)
        shared = max(num_heads // 4, 1) if shared_heads is None else shared_heads
        active = math.ceil((num_heads - shared) * 2 / 3) if active_heads is None else active_heads
        self.router = MixtureOfHeads(dim, num_heads, shared, active, device=device, dtype=dtype)

    @property
    def heads_are_independent(self) -> bool:
        """False: the router chooses among all of them."""
        return False

    def forward(  # type: ignore[override]  # what `takes_tokens` adds
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout: float, tokens: Tensor,
    ) -> Tensor:
        return super().forward(q, k, v, bias, scale, dropout) * self.router(tokens).transpose(-2, -1)[..., None]
