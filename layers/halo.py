"""Halo attention (HaloNet, arXiv 2103.12731)."""
from typing import Any

import torch
from timm.layers import make_divisible, trunc_normal_
from torch import Tensor, nn

from zoo.kernels import halo_attention
from zoo.kernels._layout import channels_last, in_layout_of
from zoo.kernels.halo_attention.reference import attention

from ._capture import report
from ._tracing import notrace_module


class RelativePositions(nn.Module):
    """What is learned for every offset of a key from a query, in rows and in columns, under timm's names."""

    def __init__(self, offsets: int, dim_head: int, **dd: Any):
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(offsets, dim_head, **dd))
        self.width_rel = nn.Parameter(torch.empty(offsets, dim_head, **dd))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.height_rel, self.width_rel


@notrace_module
class HaloAttention(nn.Module):
    """Blocked local attention with relative positions (arXiv 2103.12731, section 2.2): see `zoo.kernels.halo_attention`.

        out = halo_attention(q(x), kv(x)), with 1×1 convolutions q, of the layer's stride, and kv

    (B, dim, H, W) → (B, dim_out, ⌈H / stride⌉, ⌈W / stride⌉), any height and width, any floating dtype: halo attention takes
    the place of the 3×3 convolution in a CNN's bottleneck. `zoo.capture` gets the `attention` (B, rows and columns of blocks, heads,
    rows and columns of a block's queries, rows and columns of its window). There is no output projection; the bottleneck's next 1×1
    convolution is one. As timm's attention of a network's own: `timm.create_model("halonet26t", self_attn_layer=HaloAttention)`.

    Args:
        dim: channels of the input.
        dim_out: channels of the values and of the output, default `dim`.
        stride: 1 or 2. Where 2 does not divide the block, the output is averaged over 2×2 positions instead.
        num_heads: divides `dim_out`.
        dim_head: width of a head's queries and keys, default dim_out · qk_ratio / num_heads, rounded as timm does.
        block_size, halo_size: b and h.
        qk_ratio: see `dim_head`.
        qkv_bias: bias of the convolutions.
        device, dtype: of the parameters, as in torch.

    Differences from timm's `HaloAttn`, whose weights load as they are: maps need not be multiples of the block (see the
    operator), averages at the edge of odd maps are over what there is, and windows are never all in memory. As there, the offset
    of a key from a strided query is taken from the query's number in the block, and of the 2w − 1 rows of the tables of relative
    positions no query reads the first w − b / stride.

    Raises:
        ValueError: arguments outside what is said above, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dim_out = dim_out or dim
        if num_heads < 1 or dim_out % num_heads:
            raise ValueError(f"num_heads must divide dim_out ({dim_out}), got {num_heads}")
        if block_size < 1 or halo_size < 0:
            raise ValueError(f"block_size must be at least 1 and halo_size at least 0, got {block_size} and {halo_size}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim, self.num_heads, self.block_size, self.halo_size = dim, num_heads, block_size, halo_size
        self.stride = 1 if block_size % stride else stride
        self.dim_head = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        self.q = nn.Conv2d(dim, num_heads * self.dim_head, 1, stride=self.stride, bias=qkv_bias, **dd)
        self.kv = nn.Conv2d(dim, num_heads * self.dim_head + dim_out, 1, bias=qkv_bias, **dd)
        self.pos_embed = RelativePositions(2 * (block_size + 2 * halo_size) - 1, self.dim_head, **dd)
        self.pool = nn.Identity() if self.stride == stride else nn.AvgPool2d(2, ceil_mode=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.q, self.kv):
            trunc_normal_(conv.weight, std=self.dim**-0.5)
        for table in self.pos_embed.parameters():
            trunc_normal_(table, std=self.dim_head**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"HaloAttention: x must be (B, {self.dim}, H, W), got shape {tuple(x.shape)}")
        image = channels_last(x)  # of which projections and attention are faster, and the kernels read q, k, v in wide pieces
        q, kv = (conv(image).permute(0, 2, 3, 1).unflatten(3, (self.num_heads, -1)) for conv in (self.q, self.kv))
        k, v = kv.split((self.dim_head, kv.shape[4] - self.dim_head), 4)
        unread = self.block_size + 2 * self.halo_size - self.block_size // self.stride
        rel_h, rel_w = (table[unread:] for table in self.pos_embed())
        report(self, attention=lambda: attention(q, k, rel_h, rel_w, self.block_size, self.halo_size, self.dim_head**-0.5))
        out = halo_attention(q, k, v, rel_h, rel_w, self.block_size, self.halo_size, self.stride)
        return self.pool(in_layout_of(x, out.flatten(3).permute(0, 3, 1, 2)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, block_size={self.block_size}, halo_size={self.halo_size}, stride={self.stride}"
