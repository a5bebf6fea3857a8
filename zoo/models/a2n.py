"""A2N, attention in attention networks for super-resolution (arXiv 2104.09497).

The authors' weights (https://github.com/haoyuc/A2N, no licence stated) for ×2 and ×3 load as they are:

    timm.create_model("a2n_x2", pretrained=True, pretrained_cfg_overlay=dict(file="aan_x2.pt"))
"""
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.layers import AttentionInAttention
from zoo.layers._spatial import channels_last, resize
from zoo.layers.attention_in_attention import SLOPE
from zoo.models.conversion import renamed
from zoo.models.restoring import RestorationNetwork, checked, restoration_cfg, restoration_network

__all__ = ["AttentionInAttentionNetwork", "checkpoint_filter_fn"]

MECHANISM = "a2n"
ATTACHABLE = AttentionInAttention
HIERARCHICAL = False  # no encoder of U-Nets
DENSE = True
TASK = "restoration"


class PixelAttention(nn.Module):
    """x ⊙ sigmoid(conv(x)), a 1×1 convolution."""

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x).sigmoid()


class Enlarge(nn.Module):
    """Every position `factor`² times, a 3×3 convolution to other channels, attention to pixels, and another 3×3 convolution."""

    def __init__(self, dim: int, out_dim: int, factor: int, **dd: Any):
        super().__init__()
        self.factor = float(factor)
        self.conv1 = nn.Conv2d(dim, out_dim, 3, padding=1, **dd)
        self.attention = PixelAttention(out_dim, **dd)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.interpolate(x, scale_factor=self.factor, mode="nearest"))
        return self.act(self.conv2(self.act(self.attention(x))))


class AttentionInAttentionNetwork(RestorationNetwork):
    """A2N (arXiv 2104.09497): blocks of `zoo.layers.AttentionInAttention`, and what they change of a bilinear enlargement.

    (B, in_chans, H, W) → (B, in_chans, scale·H, scale·W), pixels from 0 to 255 on both sides, any size. Blocks weigh their branches by
    means over the whole map: a tile of a picture is not treated quite as the picture is.

    Args:
        in_chans, num_classes, device, dtype: as in timm; there are no classes: 0.
        scale: 2, 3 or 4, which is twice 2.
        dim, depth: channels and number of the blocks.
        up_dim: channels at the answer's size.
        reduction, temperature, plain_kernel: see `zoo.layers.AttentionInAttention`; a `plain_kernel` of 1 makes A2N-M.

    The authors' code is haoyuc/A2N, code/model/aan.py: AAN, in which nothing differs.

    Raises:
        ValueError: arguments outside what is said above, at construction; an input of another shape, in `forward`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 0,
        scale: int = 2,
        dim: int = 40,
        depth: int = 16,
        up_dim: int = 24,
        reduction: int = 4,
        temperature: float = 30.0,
        plain_kernel: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_chans, num_classes, scale, (2, 3, 4))
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1, **dd)
        self.blocks = nn.Sequential(*(AttentionInAttention(dim, reduction, temperature, plain_kernel, **dd) for _ in range(depth)))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        factors = (2, 2) if scale == 4 else (scale,)
        self.up = nn.Sequential(*(Enlarge(up_dim if i else dim, up_dim, factor, **dd) for i, factor in enumerate(factors)))
        self.head = nn.Conv2d(up_dim, in_chans, 3, padding=1, **dd)
        self.num_features = dim

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^stem", blocks=[(r"^blocks\.(\d+)", None), (r"^conv", (99999,))])

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, dim, H, W): what the blocks make of the input's size."""
        first = self.stem(channels_last(checked(x, self.in_chans)))
        y = checkpoint_seq(self.blocks, first) if self.grad_checkpointing else self.blocks(first)
        return first + self.conv(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.forward_features(x))) + resize(x, self.scale)


_RENAMES = [  # the authors' names → ours
    (r"^conv_first\.", "stem."),
    (r"^AAB_trunk\.", "blocks."),
    (r"^trunk_conv\.", "conv."),
    (r"^upconv(\d)\.", r"up.\1.conv1."),
    (r"^att(\d)\.", r"up.\1.attention."),
    (r"^HRconv(\d)\.", r"up.\1.conv2."),
    (r"^up\.1\.", "up.0."),
    (r"^up\.2\.", "up.1."),
    (r"^conv_last\.", "head."),
    (r"(^|\.)conv_first\.", r"\1conv_in."),
    (r"(^|\.)conv_last\.", r"\1conv_out."),
    (r"(^|\.)ADM\.", r"\1weigh."),
    (r"(^|\.)non_attention\.", r"\1plain."),
]
_OF_A_BLOCK = [(pattern, ours) for pattern, ours in _RENAMES if pattern.startswith("(")]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' names → ours, for their networks and for a single block."""
    if any(name.startswith(("stem.", "weigh.")) for name in state_dict):  # ours
        return state_dict
    renames = _OF_A_BLOCK if isinstance(model, AttentionInAttention) else _RENAMES
    return {renamed(name, renames): value for name, value in state_dict.items()}


_REPOSITORY, _COMMIT = "https://github.com/haoyuc/A2N", "aff35c6e900eb0cdfb17f9ca5856f4eb27c8037e"


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    released = dict(url=f"{_REPOSITORY}/raw/{_COMMIT}/code/experiment/model/{file}", origin_url=_REPOSITORY) if file else {}
    return restoration_cfg(
        first_conv="stem", paper_ids="arXiv:2104.09497",
        paper_name="Attention in Attention Network for Image Super-Resolution", **released, **kwargs)


default_cfgs = generate_default_cfgs({
    "a2n_x2.div2k": _cfg("aan_x2.pt"),
    "a2n_x3.div2k": _cfg("aan_x3.pt"),
    "a2n_x4.untrained": _cfg(),
    "a2n_m_x2.untrained": _cfg(),
    "a2n_m_x3.untrained": _cfg(),
    "a2n_m_x4.untrained": _cfg(),
    "a2n_nano_x2.untrained": _cfg(),
})


def _a2n(variant: str, pretrained: bool, **kwargs: Any) -> AttentionInAttentionNetwork:
    return restoration_network(AttentionInAttentionNetwork, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def a2n_x2(pretrained: bool = False, **kwargs: Any) -> AttentionInAttentionNetwork:
    """To twice the size."""
    return _a2n("a2n_x2", pretrained, **dict(dict(scale=2), **kwargs))


@register_model
def a2n_x3(pretrained: bool = False, **kwargs: Any) -> AttentionInAttentionNetwork:
    """To three times the size."""
    return _a2n("a2n_x3", pretrained, **dict(dict(scale=3), **kwargs))


@register_model
def a2n_x4(pretrained: bool = False, **kwargs: Any) -> AttentionInAttentionNetwork:
    """To four times the size."""
    return _a2n("a2n_x4", pretrained, **dict(dict(scale=4), **kwargs))


@register_model
def a2n_m_x2(pretrained: bool = False, **kwargs: Any) -> AttentionInAttentionNetwork:
    """A2N-M, whose branch without attention is a 1×1 convolution; to twice the size."""
    return _a2n("a2n_m_x2", pretrained, **dict(dict(scale=2, plain_kernel=1), **kwargs))


@register_model
def a2n_m_x3(pretrained: bool = False, **kwargs: Any) -> AttentionInAttentionNetwork:
    """A2N-M to three times the size."""
    return _a2n("a2n_m_x3", pretrained, **dict(dict(scale=3, plain_kernel=1), **kwargs))


@register_model
def a2n_m_x4(pretrained: bool = False, **kwargs: Any) -> AttentionInAttentionNetwork:
    """A2N-M to four times the size."""
    return _a2n("a2n_m_x4", pretrained, **dict(dict(scale=4, plain_kernel=1), **kwargs))


@register_model
def a2n_nano_x2(pretrained: bool = False, **kwargs: Any) -> AttentionInAttentionNetwork:
    """For small pictures and machines; not in the paper."""
    return _a2n("a2n_nano_x2", pretrained, **dict(dict(scale=2, dim=24, depth=4, up_dim=16), **kwargs))
