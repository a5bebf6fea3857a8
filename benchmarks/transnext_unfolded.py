"""TransNeXt and MoH-ViT with aggregated attention as its formula is written, windows unfolded: the rival of `zoo benchmark`.

    zoo benchmark moh_transnext_small_75 --against benchmarks.transnext_unfolded:build --batch 4 --threads 2

Every position's 9 keys and values are copied together, the bias is of all pairs of positions and pools, and attention of all
positions is two matrix products around a softmax. For sizes that 32 divides. What is not attention is ours on either side.
"""
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import AggregatedAttention, LengthScaledAttention


class _Bias(nn.Module):
    def bias(self: Any, h: int, w: int, ratio: int) -> Tensor:
        places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float()
        pools = (torch.cartesian_prod(torch.arange(h // ratio), torch.arange(w // ratio)) * ratio + (ratio - 1) / 2).float()
        r = (places[:, None] - pools) / (torch.tensor(self.pretrain_size) - 1) * 8
        return self.cpb_fc2(self.cpb_fc1(r.sign() * (r.abs() + 1).log2() / 3).relu()).permute(2, 0, 1)

    def scaled(self: Any, q: Tensor, keys: Tensor) -> Tensor:
        return (q + self.query_embedding) * F.softplus(self.temperature) * keys.log()

    def out(self: Any, x: Tensor, heads: Tensor) -> Tensor:
        heads = heads.transpose(1, 2)
        if self.router is not None:
            heads = heads * self.router(x.flatten(1, 2))[..., None]
        return self.proj(heads.flatten(2)).view_as(x)


class Unfolded(_Bias, AggregatedAttention):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n, heads, d = h * w, self.num_heads, c // self.num_heads
        q = F.normalize(self.q(x).view(b, n, heads, d).transpose(1, 2), dim=-1)
        k, v = self.kv(x).view(b, n, 2, heads, d).unbind(2)
        both = torch.stack([F.normalize(k, dim=-1), v], 2).flatten(2).transpose(1, 2).view(b, 2 * c, h, w)
        k, v = F.unfold(both, 3, padding=1).view(b, 2, heads, d, 9, n).permute(1, 0, 2, 5, 4, 3)
        outside = F.unfold(torch.ones(1, 1, h, w), 3, padding=1)[0].T == 0
        ratio = self.sr_ratio
        far = self.norm(F.avg_pool2d(F.gelu(self.sr(x.permute(0, 3, 1, 2))), ratio).flatten(2).transpose(1, 2))
        far_k, far_v = self.kv(far).view(b, -1, 2, heads, d).permute(2, 0, 3, 1, 4)
        scaled = self.scaled(q, (~outside).sum(1, keepdim=True) + far.shape[1])
        near = (k @ scaled[..., None]).squeeze(-1) + self.relative_pos_bias_local[:, None]
        logits = torch.cat([near.masked_fill(outside, -torch.inf), scaled @ F.normalize(far_k, dim=-1).mT + self.bias(h, w, ratio)], -1)
        near, pools = logits.softmax(-1).split((9, far.shape[1]), -1)
        weights = near + q @ self.learnable_tokens + self.learnable_bias
        return self.out(x, (weights[..., None, :] @ v).squeeze(-2) + pools @ far_v)


class SpelledOut(_Bias, LengthScaledAttention):
    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).view(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = self.scaled(F.normalize(q, dim=-1), torch.tensor(float(h * w))) @ F.normalize(k, dim=-1).mT + self.bias(h, w, 1)
        return self.out(x, logits.softmax(-1) @ v)


def build(name: str) -> nn.Module:
    """The network `name` of the zoo with these layers, random weights."""
    model = timm.create_model(name)
    for module in model.modules():
        rival = {AggregatedAttention: Unfolded, LengthScaledAttention: SpelledOut}.get(type(module))
        if rival is not None:
            module.__class__ = rival
    return model
