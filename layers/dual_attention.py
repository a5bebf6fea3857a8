"""Dual attention: heads that look at what tokens are, beside heads that look at how they are related (arXiv 2405.16727)."""
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from zoo.kernels._backends import in_forward_mode
from zoo.kernels._exporting import is_exporting

from ._capture import report
from ._tracing import notrace_module
from .self_attention import _bias

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "identity": None, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "softplus": F.softplus}


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads · d) → (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """(B, heads, N, d) → (B, N, heads · d)."""
    return x.transpose(1, 2).flatten(2)


@notrace_module
class SymbolicAttention(nn.Module):
    """Symbols of tokens, for relational heads to tell whose relation it is: softmax(q Tᵀ / √d) S in each head, q = W x + b.

    (B, N, C) → (B, N, C). The keys T, `template_features`, and values S, `symbol_library`, are learned, (symbols, C): every token gets a
    mixture of a few symbols. `zoo.capture` gets the `attention` (B, heads, N, symbols).

    Args:
        dim: C.
        num_heads: heads, whose number divides C.
        num_symbols: of the library.
        attn_drop: rate at which weights are left out, in training.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (Awni00/dual-attention, dual_attention/symbol_retrieval.py, release 0.0.7): weights are left out in
    training only, theirs also in evaluation, where two passes then differ.

    Raises:
        ValueError: at construction, counts that are not at least 1, or heads that do not divide C.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, num_symbols: int = 16, attn_drop: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_heads("num_heads", num_heads, dim)
        if num_symbols < 1:
            raise ValueError(f"num_symbols must be at least 1, got {num_symbols}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.q_proj = nn.Linear(dim, dim, **dd)
        self.template_features, self.symbol_library = (nn.Parameter(torch.empty(num_symbols, dim, **dd)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.template_features)
        nn.init.normal_(self.symbol_library)

    def forward(self, x: Tensor) -> Tensor:
        q = _split(self.q_proj(x), self.num_heads)
        keys, symbols = (_split(y.to(q.dtype), self.num_heads) for y in (self.template_features[None], self.symbol_library[None]))
        attention = _weights(q, keys, None)
        report(self, attention=attention)
        return _joined(F.dropout(attention, self.attn_drop, self.training) @ symbols)


@notrace_module
class RelationalAttention(nn.Module):
    """out_i = W_o concat_h Σ_j a_ij (s_j W_v + W_r r_ij): queries receive the senders' symbols s and how they are related to them.

    (B, N, C) and symbols of that shape → (B, N, heads · d). a = softmax(q Kᵀ / √d) in each head h; R relations, which all heads share,
    r_ij = act(⟨x_i W_q, x_j W_k⟩ / √r), each of projections of its own, r = heads · d / R wide. With the identity for act

        Σ_j a_ij r_ij = ⟨x_i W_q, Σ_j a_ij x_j W_k⟩ / √r

    so that the keys of relations are values of attention like any other, and no (N, N, R) numbers are made. `attn_mask` and `is_causal` are
    timm's. `zoo.capture` gets the `attention` (B, heads, N, N) and the `relations` (B, R, N, N).

    Args:
        dim: C.
        num_heads: relational heads.
        num_relations: R, which divides heads · d; default num_heads.
        total_heads: d is C / total_heads; default num_heads.
        activation: identity, relu, sigmoid, tanh or softplus.
        symmetric: W_k of the relations is their W_q: r_ij = r_ji.
        attn_drop, proj_drop: rates of dropout of weights, and of outputs.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (Awni00/dual-attention, dual_attention/relational_attention.py, release 0.0.7): above, theirs makes
    the relations of all pairs; no rotary embeddings, shared keys or relative symbols, which their vision models do not have.

    Raises:
        ValueError: at construction, heads that do not divide C, relations that do not divide the heads' width, an unknown
            activation; in `forward`, symbols of another shape than x.
    """

    def __init__(
        self, dim: int, num_heads: int, num_relations: int | None = None, total_heads: int | None = None, activation: str = "identity",
        symmetric: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_heads("num_heads" if total_heads is None else "total_heads", total_heads or num_heads, dim)
        self.num_heads, self.head_dim = num_heads, dim // (total_heads or num_heads)
        width = num_heads * self.head_dim
        self.num_relations = num_heads if num_relations is None else num_relations
        if num_heads < 1 or self.num_relations < 1 or width % self.num_relations:
            raise ValueError(f"num_relations must divide the width of the relational heads ({width}), got {num_relations}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.symmetric, self.attn_drop = activation, symmetric, attn_drop
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.wq_attn, self.wk_attn, self.wq_rel = (nn.Linear(dim, width, bias=False, **dd) for _ in range(3))
        self.wk_rel = self.wq_rel if symmetric else nn.Linear(dim, width, bias=False, **dd)
        self.wr = nn.Parameter(torch.empty(num_heads, self.head_dim, self.num_relations, **dd))
        self.wv = nn.Linear(dim, width, bias=False, **dd)
        self.wo = nn.Linear(width, width, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.wr, a=math.sqrt(5))

    def forward(self, x: Tensor, symbols: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if symbols.shape != x.shape:
            raise ValueError(f"RelationalAttention needs symbols of the shape of x, {tuple(x.shape)}, got {tuple(symbols.shape)}")
        q, k, v = (_split(linear(y), self.num_heads) for linear, y in ((self.wq_attn, x), (self.wk_attn, x), (self.wv, symbols)))
        of_q, of_k = (_split(linear(x), self.num_relations) for linear in (self.wq_rel, self.wk_rel))
        of_q = of_q * of_q.shape[-1] ** -0.5
        bias = _bias(x, attn_mask, is_causal)
        report(self, attention=lambda: _weights(q, k, bias), relations=lambda: self._relations(of_q, of_k))
        attended, relations = self._attended(q, k, v, of_q, of_k, bias)
        out = attended + torch.einsum("bhir,hdr->bhid", relations, self.wr.to(relations.dtype))
        return self.proj_drop(self.wo(_joined(out)))

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What every head receives of symbols, (B, heads, N, d), and of relations, (B, heads, N, R)."""
        dropout = self.attn_drop if self.training else 0.0
        if ACTIVATIONS[self.activation] is None:
            senders = _joined(of_k)[:, None].expand(-1, self.num_heads, -1, -1)
            received = _attend(q, k, torch.cat([v, senders], -1), bias, dropout)
            symbols, keys = received.split([v.shape[-1], senders.shape[-1]], -1)
            return symbols, torch.einsum("brid,bhird->bhir", of_q, keys.unflatten(-1, (self.num_relations, -1)))
        attention = F.dropout(_weights(q, k, bias), dropout)
        return attention @ v, torch.einsum("bhij,brij->bhir", attention, self._relations(of_q, of_k))

    def _relations(self, of_q: Tensor, of_k: Tensor) -> Tensor:
        relations, activation = of_q @ of_k.mT, ACTIVATIONS[self.activation]
        return relations if activation is None else activation(relations)

    def extra_repr(self) -> str:
        return f"num_relations={self.num_relations}, activation={self.activation!r}, symmetric={self.symmetric}"


@notrace_module
class PlainHeads(nn.Module):
    """The heads of self-attention beside relational ones: W_o concat_h softmax(q Kᵀ / √d) V, (B, N, C) → (B, N, heads · d).

    `zoo.capture` gets the `attention` (B, heads, N, N).
    """

    def __init__(self, dim: int, num_heads: int, total_heads: int, attn_drop: float, proj_drop: float, **dd: Any):
        super().__init__()
        width = num_heads * (dim // total_heads)
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.wq, self.wk, self.wv = (nn.Linear(dim, width, bias=False, **dd) for _ in range(3))
        self.wo = nn.Linear(width, width, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = (_split(linear(x), self.num_heads) for linear in (self.wq, self.wk, self.wv))
        bias = _bias(x, attn_mask, is_causal)
        report(self, attention=lambda: _weights(q, k, bias))
        return self.proj_drop(self.wo(_joined(_attend(q, k, v, bias, self.attn_drop if self.training else 0.0))))


@notrace_module
class DualAttention(nn.Module):
    """Heads of self-attention beside heads of relational attention: concat(self-attention(x), relational attention(x, symbols)).

    (B, N, C) and symbols of that shape, as of `SymbolicAttention`, → (B, N, C). All heads are C / (self_heads + relational_heads) wide;
    either kind has an output projection of its own, and there are no biases. What is captured is that of the children
    `self_attention` and `relational_attention`, as `RelationalAttention` says.

    Args:
        dim: C, which the number of all heads divides.
        self_heads, relational_heads: how many of either kind; one may be 0.
        num_relations, activation, symmetric: of `RelationalAttention`.
        attn_drop, proj_drop: rates of dropout of weights, and of outputs.
        device, dtype: of the parameters, as in torch.

    Raises:
        ValueError: as `RelationalAttention`, and for no heads at all.
    """

    def __init__(
        self, dim: int, self_heads: int, relational_heads: int, num_relations: int | None = None, activation: str = "identity",
        symmetric: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if self_heads < 0 or relational_heads < 0:
            raise ValueError(f"self_heads and relational_heads must be at least 0, got {self_heads} and {relational_heads}")
        total, dd = self_heads + relational_heads, dict[str, Any](device=device, dtype=dtype)
        _check_heads("self_heads + relational_heads", total, dim)
        self.self_attention = PlainHeads(dim, self_heads, total, attn_drop, proj_drop, **dd) if self_heads else None
        self.relational_attention = RelationalAttention(
            dim, relational_heads, num_relations, total, activation, symmetric, attn_drop, proj_drop, **dd) if relational_heads else None

    def forward(self, x: Tensor, symbols: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        found = []
        if self.self_attention is not None:
            found.append(self.self_attention(x, attn_mask, is_causal))
        if self.relational_attention is not None:
            found.append(self.relational_attention(x, symbols, attn_mask, is_causal))
        return torch.cat(found, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    if is_exporting() or in_forward_mode() or not use_fused_attn():
        return F.dropout(_weights(q, k, bias), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, dropout)


def _weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    z = (q * q.shape[-1] ** -0.5) @ k.mT
    return (z if bias is None else z + bias.to(z.dtype)).softmax(-1)


def _check_heads(name: str, heads: int, dim: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"{name} must divide dim ({dim}), got {heads}")
