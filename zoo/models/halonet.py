"""HaloNets (Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731).

ResNet's bottlenecks with halo attention in place of the 3×3 convolution, in all four stages. There is no code and there are no
weights by the authors (docs/cards/halo.md). Multiply-adds of one image, those of the paper's table and ours, in G:

| | H0 | H1 | H2 | H3 | H4 | H5 | H6 | H7 |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| paper | 2.4 | 3.0 | 3.4 | 6.3 | 12.2 | 32.6 | 53.2 | 119.6 |
| ours | 2.3 | 2.9 | 3.3 | 6.1 | 11.9 | 32.0 | 52.4 | 110.2 |
"""
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels._layout import channels_last
from zoo.layers import HaloAttention
from zoo.models.building import build_model_with_cfg
from zoo.models.staged import StagedNetwork, downsampling, named, stochastic_depth

__all__ = ["HaloNet"]

MECHANISM = "halo"
ATTACHABLE = HaloAttention
REPORTED_IN = "the paper's table of H0 to H7"
REPORTED_TOP1 = {
    "halonet_h0_256": 77.9, "halonet_h1_256": 79.9, "halonet_h2_256": 80.4, "halonet_h3_320": 81.9, "halonet_h4_384": 83.3,
    "halonet_h5_448": 84.0, "halonet_h6_512": 84.4, "halonet_h7_600": 84.9,
}


def _conv_norm(dim: int, dim_out: int, stride: int = 1, **dd: Any) -> nn.Sequential:
    return named(conv=nn.Conv2d(dim, dim_out, 1, stride, bias=False, **dd), norm=nn.BatchNorm2d(dim_out, **dd))


class Block(nn.Module):
    """act(shortcut(x) + W_out act(norm(attention(act(W_in x))))), a norm behind either W.

    (B, dim, H, W) → (B, dim_out, ⌈H / stride⌉, ⌈W / stride⌉). `attn` is the halo attention, of `hidden` channels in.
    """

    def __init__(
        self, dim: int, dim_out: int, hidden: int, value_dim: int, stride: int, drop_path: float,
        device: torch.device | str | None, dtype: torch.dtype | None, **attn_args: Any,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        changes = stride > 1 or dim != dim_out
        self.shortcut = _conv_norm(dim, dim_out, stride, **dd) if changes else nn.Identity()
        self.reduce = _conv_norm(dim, hidden, **dd)
        self.attn = HaloAttention(hidden, value_dim, stride=stride, **attn_args, **dd)
        self.norm = nn.BatchNorm2d(value_dim, **dd)
        self.expand = _conv_norm(value_dim, dim_out, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.attn(self.act(self.reduce(x)))))
        return self.act(self.shortcut(x) + self.drop_path(self.expand(y)))


class Stage(nn.Module):
    """Blocks, the first of which may halve the resolution; inside, the memory is channels-last, as attention reads it."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x


class HaloNet(StagedNetwork):
    """HaloNet, any input size.

    Args:
        in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate, device, dtype: as in timm.
        dims, depths: width of queries and keys, and number of blocks, of the four stages.
        num_heads: of each stage.
        block_size, halo_size: b and h of the paper, in all stages (see `zoo.layers.HaloAttention`).
        value_ratio, out_ratio: r_v and r_b of the paper: widths of the values and of the blocks' outputs over `dims`.
        final_dim: d_f of the paper, width of a 1×1 convolution before pooling; None leaves it out.

    The activation, which the paper's table does not say, is SiLU. Sizes that blocks do not divide are padded and masked.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (3, 3, 10, 3),
        num_heads: tuple[int, ...] = (4, 8, 8, 8),
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1.0,
        out_ratio: float = 1.0,
        final_dim: int | None = None,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        drop_path_rates = stochastic_depth(drop_path_rate, depths)

        width = dims[0]
        self.stem = named(
            conv=nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **dd), norm=nn.BatchNorm2d(width, **dd), act=nn.SiLU(),
            pool=nn.MaxPool2d(3, stride=2, padding=1))
        self.feature_info, stages = [], []
        strides = downsampling(len(dims), output_stride)
        for i, (dim, heads, (stride, reduction)) in enumerate(zip(dims, num_heads, strides, strict=True)):
            blocks, dim_out = [], int(out_ratio * dim)
            for j, rate in enumerate(drop_path_rates[i]):
                blocks.append(Block(
                    width, dim_out, dim, int(value_ratio * dim), 1 if j else stride, rate,
                    num_heads=heads, dim_head=dim // heads, block_size=block_size, halo_size=halo_size, **dd))
                width = dim_out
            stages.append(Stage(blocks))
            self.feature_info.append(dict(num_chs=width, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.num_features = final_dim or width
        self.final_conv = nn.Identity()
        if final_dim:
            self.final_conv = named(**dict(_conv_norm(width, final_dim, **dd).named_children()), act=nn.SiLU())
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("_rel")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^final_conv", (99999,))]
        return dict(stem=r"^stem", blocks=[(r"^stages\.(\d+)", None), (r"^final_conv", (99999,))] if coarse else blocks)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.final_conv(x)

    def drop_norm(self) -> None:
        self.final_conv = nn.Identity()


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, size, size), pool_size=(-(-size // 32), -(-size // 32)), crop_pct=0.875,
        interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.conv", classifier="head.fc",
        paper_ids="arXiv:2103.12731",
        paper_name="Scaling Local Self-Attention for Parameter Efficient Visual Backbones", **kwargs,
    )


default_cfgs = generate_default_cfgs({
    "halonet_nano.untrained": _cfg(224),
    "halonet_h0_256.untrained": _cfg(256),
    "halonet_h1_256.untrained": _cfg(256),
    "halonet_h2_256.untrained": _cfg(256),
    "halonet_h3_320.untrained": _cfg(320),
    "halonet_h4_384.untrained": _cfg(384),
    "halonet_h5_448.untrained": _cfg(448),
    "halonet_h6_512.untrained": _cfg(512),
    "halonet_h7_600.untrained": _cfg(600),
})


def _halonet(variant: str, pretrained: bool, **kwargs: Any) -> HaloNet:
    return build_model_with_cfg(
        HaloNet, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs)


@register_model
def halonet_nano(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """For small images and machines; not in the paper."""
    args = dict(
        dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(2, 4, 6, 8), block_size=4, halo_size=1, out_ratio=2.0, final_dim=256)
    return _halonet("halonet_nano", pretrained, **dict(args, **kwargs))


@register_model
def halonet_h0_256(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _halonet("halonet_h0_256", pretrained, **dict(dict(depths=(3, 3, 7, 3), out_ratio=0.5), **kwargs))


@register_model
def halonet_h1_256(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _halonet("halonet_h1_256", pretrained, **dict(dict(depths=(3, 3, 10, 3)), **kwargs))


@register_model
def halonet_h2_256(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    return _halonet("halonet_h2_256", pretrained, **dict(dict(depths=(3, 3, 11, 3), out_ratio=1.25), **kwargs))


@register_model
def halonet_h3_320(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    args = dict(depths=(3, 3, 12, 3), block_size=10, out_ratio=1.5, final_dim=1024)
    return _halonet("halonet_h3_320", pretrained, **dict(args, **kwargs))


@register_model
def halonet_h4_384(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    args = dict(depths=(3, 3, 12, 3), block_size=12, halo_size=2, out_ratio=3.0, final_dim=1280)
    return _halonet("halonet_h4_384", pretrained, **dict(args, **kwargs))


@register_model
def halonet_h5_448(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    args = dict(depths=(3, 3, 23, 3), block_size=14, halo_size=2, value_ratio=2.5, out_ratio=2.0, final_dim=1536)
    return _halonet("halonet_h5_448", pretrained, **dict(args, **kwargs))


@register_model
def halonet_h6_512(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    args = dict(depths=(3, 3, 24, 3), block_size=8, halo_size=4, value_ratio=3.0, out_ratio=2.75, final_dim=1536)
    return _halonet("halonet_h6_512", pretrained, **dict(args, **kwargs))


@register_model
def halonet_h7_600(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    args = dict(depths=(3, 3, 26, 3), block_size=10, value_ratio=4.0, out_ratio=3.5, final_dim=2048)
    return _halonet("halonet_h7_600", pretrained, **dict(args, **kwargs))
