"""HAN, the holistic attention network for super-resolution (arXiv 2008.08767).

The authors' networks (https://github.com/wwlCape/HAN, Apache 2.0, src/model/han.py); their files load as they are:

    timm.create_model("han_x2", pretrained=True, pretrained_cfg_overlay=dict(file="HAN_BIX2.pt"))
"""
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.layers import ChannelSpatialAttention, LayerAttention
from zoo.layers._capture import report
from zoo.layers._spatial import channels_last
from zoo.models.conversion import renamed
from zoo.models.restoring import RestorationNetwork, checked, restoration_cfg, restoration_network
from zoo.models.staged import named

__all__ = ["HolisticAttentionNetwork", "checkpoint_filter_fn"]

MECHANISM = "holistic"
ATTACHABLE = ChannelSpatialAttention
HIERARCHICAL = False  # no encoder of U-Nets
DENSE = True
TASK = "restoration"
MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's pixels, red, green, blue, in [0, 1]


class Shift(nn.Module):
    """x + sign · 255 · the mean colour, as the 1×1 convolution that the authors' files hold; of other channels their mean's mean.

    Its numbers are buffers: nothing learns them.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, sign: int, **dd: Any):
        super().__init__()
        self.sign = sign
        self.register_buffer("weight", torch.empty(channels, channels, 1, 1, **dd))
        self.register_buffer("bias", torch.empty(channels, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        channels = len(self.bias)
        mean = MEAN if channels == 3 else (sum(MEAN) / 3,) * channels
        self.weight.copy_(torch.eye(channels)[:, :, None, None])
        self.bias.copy_(torch.tensor([self.sign * 255 * value for value in mean]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class ResidualChannelAttentionBlock(nn.Module):
    """x + g ⊙ y with y = conv₂(ReLU(conv₁(x))) and a gate for every channel, g = sigmoid(W₂ ReLU(W₁ mean(y))) (RCAN's block).

    `zoo.capture` gets the `gate`, (B, C, 1, 1).
    """

    def __init__(self, dim: int, reduction: int, **dd: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.down = nn.Conv2d(dim, dim // reduction, 1, **dd)
        self.up = nn.Conv2d(dim // reduction, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.act(self.conv1(x)))
        gate = self.up(self.act(self.down(y.mean((2, 3), keepdim=True)))).sigmoid()
        report(self, gate=gate)
        return x + gate * y


class ResidualGroup(nn.Module):
    """Blocks and a 3×3 convolution, around which the input goes."""

    def __init__(self, dim: int, depth: int, reduction: int, **dd: Any):
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualChannelAttentionBlock(dim, reduction, **dd) for _ in range(depth)))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks(x))


class HolisticAttentionNetwork(RestorationNetwork):
    """HAN (arXiv 2008.08767): residual groups of channel attention, attention between the groups, attention over channels and positions.

    (B, in_chans, H, W) → (B, in_chans, scale·H, scale·W), pixels from 0 to 255 on both sides, any size. Channel attention is of means
    over the whole map, and attention between layers of sums: a tile of a picture is not treated quite as the picture is.

        h = stem(x − mean);  g₁, …, g_n the groups' features;  y = conv(g_n)
        out = up(h + fuse([ChannelSpatialAttention(y), fuse_layers(LayerAttention([y, g_n, …, g₁]))])) + mean

    Args:
        in_chans, num_classes, device, dtype: as in timm; there are no classes: 0.
        scale: 2, 3, 4 or 8.
        dim: channels.
        groups, depth: the number of groups, and of blocks in each.
        reduction: of the channels inside channel attention.

    Differences from the authors' code (wwlCape/HAN, src/model/han.py: HAN): attention between layers is computed in float32 whatever the
    network's dtype, see `zoo.layers.LayerAttention`; the mean colour is in buffers, where theirs is in parameters without gradient.

    Raises:
        ValueError: arguments outside what is said above, at construction; an input of another shape, in `forward`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 0,
        scale: int = 2,
        dim: int = 64,
        groups: int = 10,
        depth: int = 20,
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_chans, num_classes, scale, (2, 3, 4, 8))
        if not 1 <= reduction <= dim:
            raise ValueError(f"reduction must be from 1 to dim, {dim}, got {reduction}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.subtract_mean, self.add_mean = Shift(in_chans, -1, **dd), Shift(in_chans, 1, **dd)
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1, **dd)
        self.groups = nn.ModuleList(ResidualGroup(dim, depth, reduction, **dd) for _ in range(groups))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.channel_spatial = ChannelSpatialAttention(dim, **dd)
        self.layers = LayerAttention(**dd)
        self.fuse_layers = nn.Conv2d(dim * (groups + 1), dim, 3, padding=1, **dd)
        self.fuse = nn.Conv2d(dim * 2, dim, 3, padding=1, **dd)
        factors = (3,) if scale == 3 else (2,) * int(math.log2(scale))
        self.up = nn.Sequential(*(named(conv=nn.Conv2d(dim, dim * factor**2, 3, padding=1, **dd), shuffle=nn.PixelShuffle(factor))
                                  for factor in factors))
        self.head = nn.Conv2d(dim, in_chans, 3, padding=1, **dd)
        self.num_features = dim

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^groups\.(\d+)" if coarse else [(r"^groups\.(\d+)\.blocks\.(\d+)", None), (r"^groups\.(\d+)\.conv", (99,))]
        return dict(stem=r"^stem|^subtract_mean", blocks=blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, dim, H, W): what the groups and the attention make of the input's size."""
        h = y = self.stem(self.subtract_mean(channels_last(checked(x, self.in_chans))))
        features = []
        for group in self.groups:
            y = checkpoint(group, y) if self.grad_checkpointing else group(y)
            features.insert(0, y)  # the newest first
        y = self.conv(y)
        layers = self.layers(torch.stack([y, *features], 1)).flatten(1, 2)
        return h + self.fuse(torch.cat([self.channel_spatial(y), self.fuse_layers(layers)], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.add_mean(self.head(self.up(self.forward_features(x))))


def _renames(groups: int, depth: int) -> list[tuple[str, str]]:
    """The authors' names → ours; the last of the modules in `body`, and in each group's, is a convolution."""
    return [
        (r"^sub_mean\.", "subtract_mean."),
        (r"^head\.0\.", "stem."),
        (rf"^body\.{groups}\.", "conv."),
        (r"^body\.(\d+)\.body\.", r"groups.\1.blocks."),
        (rf"^groups\.(\d+)\.blocks\.{depth}\.", r"groups.\1.conv."),
        (r"(^|\.)body\.0\.", r"\1conv1."),
        (r"(^|\.)body\.2\.", r"\1conv2."),
        (r"(^|\.)body\.3\.conv_du\.0\.", r"\1down."),
        (r"(^|\.)body\.3\.conv_du\.2\.", r"\1up."),
        (r"^csa\.", "channel_spatial."),
        (r"^la\.", "layers."),
        (r"^last_conv\.", "fuse_layers."),
        (r"^last\.", "fuse."),
        (r"^tail\.0\.0\.", "up.0.conv."),
        (r"^tail\.0\.2\.", "up.1.conv."),
        (r"^tail\.0\.4\.", "up.2.conv."),
        (r"^tail\.1\.", "head."),
    ]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' names → ours, for their networks and for a single block or layer, whose convolution over channels has five axes."""
    state_dict = {name: value[0] if value.ndim == 5 else value for name, value in state_dict.items()}
    if isinstance(model, HolisticAttentionNetwork):
        if any(name.startswith("stem.") for name in state_dict):  # ours
            return state_dict
        renames = _renames(len(model.groups), len(cast(ResidualGroup, model.groups[0]).blocks))
    else:
        renames = [rename for rename in _renames(0, 0) if rename[0].startswith("(")]
    return {renamed(name, renames): value for name, value in state_dict.items()}


_REPOSITORY = "https://github.com/wwlCape/HAN"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return restoration_cfg(first_conv="stem", paper_ids="arXiv:2008.08767",
                           paper_name="Single Image Super-Resolution via a Holistic Attention Network", **kwargs)


def _released() -> dict[str, Any]:
    return _cfg(license="apache-2.0", origin_url=_REPOSITORY)


default_cfgs = generate_default_cfgs({
    "han_x2.div2k": _released(),
    "han_x3.div2k": _released(),
    "han_x4.div2k": _released(),
    "han_x8.div2k": _released(),
    "han_nano_x2.untrained": _cfg(),
})


def _han(variant: str, pretrained: bool, **kwargs: Any) -> HolisticAttentionNetwork:
    return restoration_network(HolisticAttentionNetwork, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def han_x2(pretrained: bool = False, **kwargs: Any) -> HolisticAttentionNetwork:
    """To twice the size."""
    return _han("han_x2", pretrained, **dict(dict(scale=2), **kwargs))


@register_model
def han_x3(pretrained: bool = False, **kwargs: Any) -> HolisticAttentionNetwork:
    """To three times the size."""
    return _han("han_x3", pretrained, **dict(dict(scale=3), **kwargs))


@register_model
def han_x4(pretrained: bool = False, **kwargs: Any) -> HolisticAttentionNetwork:
    """To four times the size."""
    return _han("han_x4", pretrained, **dict(dict(scale=4), **kwargs))


@register_model
def han_x8(pretrained: bool = False, **kwargs: Any) -> HolisticAttentionNetwork:
    """To eight times the size."""
    return _han("han_x8", pretrained, **dict(dict(scale=8), **kwargs))


@register_model
def han_nano_x2(pretrained: bool = False, **kwargs: Any) -> HolisticAttentionNetwork:
    """For small pictures and machines; not in the paper."""
    return _han("han_nano_x2", pretrained, **dict(dict(scale=2, dim=16, groups=3, depth=2, reduction=4), **kwargs))
