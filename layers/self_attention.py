"""Self-attention of tokens as timm's vision transformers have it, around any mechanism in its middle."""
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from ._tracing import notrace_module
from .normalized_attention import NormalizedAttention

GATES = ("head", "element")


class AroundMechanism:
    """What the classes below add to timm's: a child `mechanism` (q, k, v, bias, scale, dropout) → (B, heads, N, d) between the
    projections, which gets the tokens, too, where its class has `takes_tokens`, and a `gate` of its outputs by the tokens, of a width
    that the number of heads divides."""

    def _heads(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, N, d)."""
        if self.qkv is None:
            q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        else:
            qkv = self.qkv(x)
            if getattr(self, "q_bias", None) is not None:  # EVA's and BEiT's, which have none of keys
                qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias)).to(qkv.dtype)
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _out(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        tokens = (x,) if getattr(self.mechanism, "takes_tokens", False) else ()
        o = self.mechanism(q, k, v, bias, self.scale, self.attn_drop.p if self.training else 0.0, *tokens)
        o = o.transpose(1, 2).flatten(2)
        if hasattr(self, "norm"):
            o = self.norm(o)
        if getattr(self, "gate", None) is not None:
            gate = self.gate(x).sigmoid().unflatten(-1, (self.num_heads, -1))
            o = (o.unflatten(-1, (self.num_heads, -1)) * gate).flatten(2)
        return self.proj_drop(self.proj(o))


def _bias(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What is added to logits: of a boolean mask -∞ where it is false."""
    if is_causal:  # which timm lets take the mask's place
        return x.new_full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, x.new_zeros(()), -torch.inf)
    return attn_mask


@notrace_module
class SelfAttention(AroundMechanism, Attention):
    """Multi-head self-attention with a choice of normalizer and gate: proj(gate ⊙ (A V)), A as in `NormalizedAttention`.

    (B, N, C) → (B, N, dim_out), any floating dtype; `forward` also takes `attn_mask`, boolean (false: masked) or added to the
    logits, and `is_causal`, as timm's. It is timm's `Attention` with timm's parameters, and fits as `attn_layer` of its vision
    transformers. `zoo.capture` gets the `attention` of the child `mechanism`. For models that are built: `zoo.replace_attention`.

    Args:
        dim: C.
        num_heads: heads, whose number divides C.
        normalizer, alpha: as in `NormalizedAttention`.
        gate: None; "head", sigmoid of one number per head and token, x W + b (arXiv 2505.06708); "element", of one per
            channel, which is timm's own `gated=True`.
        attention_args: further arguments of `timm.layers.Attention`.

    Raises:
        ValueError: at construction, an unknown normalizer or gate.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, normalizer: str = "softmax", gate: str | None = None, alpha: float | None = None,
        **attention_args: Any,
    ):
        super().__init__(dim, num_heads, **{**attention_args, **(dict(gated=True) if gate == "element" else {})})
        if gate not in (None, *GATES):
            raise ValueError(f"gate must be None, 'head' or 'element', got {gate!r}")
        dd: dict[str, Any] = {name: attention_args.get(name) for name in ("device", "dtype")}
        if gate == "head":
            self.gate = nn.Linear(dim, num_heads, bias=self.qkv.bias is not None, **dd)
        self.mechanism = NormalizedAttention(num_heads, self.head_dim, normalizer, alpha, **dd)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self._out(x, *self._heads(x), _bias(x, attn_mask, is_causal))


class _WithRope(AroundMechanism):
    def forward(
        self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Tensor:
        q, k, v = self._heads(x)
        if rope is not None:
            q, k = (self._rotated(y, rope).to(v.dtype) for y in (q, k))
        if k.shape[1] != q.shape[1]:
            k, v = (y.repeat_interleave(self.num_kv_groups, dim=1) for y in (k, v))
        return self._out(x, q, k, v, _bias(x, attn_mask, is_causal))

    def _rotated(self: Any, y: Tensor, rope: Tensor) -> Tensor:
        prefix, patches = y[:, :, : self.num_prefix_tokens], y[:, :, self.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], 2)


@notrace_module
class RopeSelfAttention(_WithRope, AttentionRope):
    """timm's `AttentionRope` around a mechanism."""


@notrace_module
class EvaSelfAttention(_WithRope, EvaAttention):
    """EVA's and DINOv3's attention around a mechanism."""


@notrace_module
class BeitSelfAttention(AroundMechanism, BeitAttention):
    """BEiT's attention around a mechanism: its relative positions are added to the logits."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        own = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        both = [bias for bias in (own, shared_rel_pos_bias) if bias is not None]
        return self._out(x, *self._heads(x), sum(both[1:], start=both[0]) if both else None)


@notrace_module
class RelPosSelfAttention(AroundMechanism, RelPosAttention):
    """The attention of timm's vision transformers with relative positions around a mechanism."""

    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return self._out(x, *self._heads(x), shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias())


@notrace_module
class WindowSelfAttention(AroundMechanism, WindowAttention):
    """Swin's attention around a mechanism: what its mask takes -100 from is masked altogether."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self._get_rel_pos_bias()
        if mask is not None:
            mask = torch.where(mask == 0, mask, -torch.inf).repeat(x.shape[0] // mask.shape[0], 1, 1)
            bias = bias + mask[:, None]
        return self._out(x, *self._heads(x), bias)


AROUND: dict[type[nn.Module], type[nn.Module]] = {
    Attention: SelfAttention, AttentionRope: RopeSelfAttention, EvaAttention: EvaSelfAttention, BeitAttention: BeitSelfAttention,
    RelPosAttention: RelPosSelfAttention, WindowAttention: WindowSelfAttention,
}
