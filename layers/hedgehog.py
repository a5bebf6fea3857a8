"""Hedgehog, linear attention with learned features that imitate softmax (arXiv 2402.04347)."""
from typing import Any

import torch
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module

FEATURE_MAPS = ("softmax_dim", "exp_dim")
EPS = 1e-12  # the authors', of features and of sums


class FeatureMap(nn.Module):
    """φ(x) = [softmax(z), softmax(-z)] over features, or [exp(z - max z), exp(min z - z)]; z = x W, or x + x W.

    (B, heads, N, d) → (B, heads, N, 2 F), F without the second half. At least 1e-12, in at least float32.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int, feature_map: str, skip: bool, both_signs: bool, **dd: Any):
        super().__init__()
        self.feature_map, self.skip, self.both_signs = feature_map, skip, both_signs
        self.layer = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.layer.copy_(torch.zeros(()) if self.skip else torch.eye(*self.layer.shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        z = x @ self.layer.to(x.dtype)
        z = x + z if self.skip else z
        halves = (z, -z) if self.both_signs else (z,)
        if self.feature_map == "softmax_dim":
            features = [half.softmax(-1) for half in halves]
        else:
            features = [(half - half.amax(-1, keepdim=True)).exp() for half in halves]
        return torch.cat(features, -1).clamp_min(EPS)


@notrace_module
class HedgehogAttention(nn.Module):
    """Linear attention: out_i = φ_q(q_i) Σ_j φ_k(k_j)ᵀ v_j / (φ_q(q_i) Σ_j φ_k(k_j) + 1e-12), φ as in `FeatureMap`.

    (B, heads, N, d) three times → (B, heads, N, d): memory and time are linear in N, at any N; no matrix of tokens is made. In the
    place of softmax by `zoo.replace_attention(vit, "hedgehog")`; its maps learn that of softmax by `zoo.AttentionDistillationLoss`.
    Computed in at least float32, under autocast too. `zoo.capture` gets the `attention` (B, heads, N, N) that it stands for.

    Args:
        num_heads, head_dim: of queries, keys and values.
        feature_dim: F; default head_dim.
        feature_map: "softmax_dim" or "exp_dim".
        skip: z = x + x W, W starting at 0; requires F = head_dim. Without, W starts as the identity.
        both_signs: False leaves out the second half of the features.
        device, dtype: of the parameters, as in torch.

    Masks of keys, (…, 1, N), are taken. What differs between queries (relative positions, Swin's windows, causal masks) is not:
    linear attention has no place for it.

    Differences from the authors' code (HazyResearch/lolcats, src/model/feature_map.py): W starts as the paper's, theirs by Kaiming's rule.

    Raises:
        ValueError: at construction, an unknown feature_map, or a skip with another feature_dim; in `forward`, a mask that differs
            between queries, and dropout, which would need weights to drop.
    """

    takes_bias = False
    heads_are_independent = True

    def __init__(
        self, num_heads: int, head_dim: int, feature_dim: int | None = None, feature_map: str = "softmax_dim", skip: bool = False,
        both_signs: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        feature_dim = feature_dim or head_dim
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        if skip and feature_dim != head_dim:
            raise ValueError(f"skip needs feature_dim to be head_dim ({head_dim}), got {feature_dim}")
        self.feature_map_q, self.feature_map_k = (
            FeatureMap(num_heads, head_dim, feature_dim, feature_map, skip, both_signs, device=device, dtype=dtype) for _ in range(2))

    def keep_heads(self, heads: list[int]) -> None:
        """Leaves these heads, in place."""
        for features in (self.feature_map_q, self.feature_map_k):
            features.layer = nn.Parameter(features.layer.detach()[heads], requires_grad=features.layer.requires_grad)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None, dropout: float = 0.0,
    ) -> Tensor:
        """`scale`, which features do not have, is not used."""
        if dropout:
            raise ValueError(f"HedgehogAttention has no attention weights that dropout ({dropout}) could leave out")
        with torch.autocast(q.device.type, enabled=False):
            of_q, of_k = self.features(q, k, bias)
            values = v.to(of_k.dtype)
            report(self, attention=lambda: _normalized(of_q @ of_k.mT))
            out = of_q @ (of_k.mT @ values) / (of_q @ of_k.sum(-2)[..., None] + EPS)
        return out.to(v.dtype)

    def features(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """φ_q(q) and φ_k(k), 0 where `bias` masks a key."""
        of_q, of_k = self.feature_map_q(q), self.feature_map_k(k)
        if bias is None:
            return of_q, of_k
        if bias.ndim > 1 and bias.shape[-2] != 1:
            raise ValueError(f"HedgehogAttention takes masks of keys, (…, 1, {k.shape[-2]}), not one that differs between queries, "
                             f"of shape {tuple(bias.shape)}")
        weights = bias.to(of_k.dtype).exp()  # a factor of every key's weight, as in softmax
        return of_q, of_k * (weights[:, None] if weights.ndim == 1 else weights.transpose(-2, -1))


def _normalized(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + EPS)
