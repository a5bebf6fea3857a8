"""LITv2 (arXiv 2205.13213): convolutional MLPs in four stages, HiLo attention in the third, ordinary attention in the fourth.

The authors' checkpoints (Apache 2.0 licence; https://github.com/ziplab/LITv2) load as they are, also from their addresses:

    timm.create_model("litv2_s", pretrained=True)
"""
import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels._exporting import is_exporting
from zoo.layers import DeformableTokenMerging, HiLoAttention
from zoo.layers._initialization import fan_out_normal_
from zoo.layers._linear import linear
from zoo.layers._plain import is_plain
from zoo.layers._spatial import pad_to_multiple
from zoo.layers._tracing import notrace_module
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.staged import StagedNetwork, downsampling, stochastic_depth

__all__ = ["ConvMlp", "LITv2", "checkpoint_filter_fn"]

MECHANISM = "hilo"
StateDict = dict[str, Tensor]
REPORTED_IN = "the authors' README"
REPORTED_TOP1 = {"litv2_s": 82.0, "litv2_m": 83.3, "litv2_b": 83.6, "litv2_b_384": 84.7}


@notrace_module
class ConvMlp(nn.Module):
    """fc2(GELU(dwconv3×3(fc1(x)))), NHWC → NHWC. The convolution tells positions apart: LITv2 has no position embedding.

    Without gradients on the CPU, large hidden maps are made an image at a time, which the caches hold from one step to the next.
    Where one of the modules has hooks or is not what was built here, they are called once for all images instead.
    """

    LARGE = 1 << 20  # numbers in the hidden map of an image

    def __init__(self, dim: int, hidden: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_out_normal_(self.dwconv)

    def forward(self, x: Tensor) -> Tensor:
        plain = is_plain(self.fc1, nn.Linear) and is_plain(self.dwconv, nn.Conv2d) and is_plain(self.fc2, nn.Linear)
        if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_exporting() or x.device.type != "cpu":
            return linear(self.fc2, F.gelu(self._convolved(x)))
        large = x.shape[1] * x.shape[2] * self.fc1.out_features >= self.LARGE
        # In place, as a fresh map costs as much as the arithmetic.
        parts = [linear(self.fc2, torch.ops.aten.gelu_(self._convolved(part))) for part in (x.split(1) if large else [x])]
        return torch.cat(parts) if large else parts[0]

    def _convolved(self, x: Tensor) -> Tensor:
        return self.dwconv(linear(self.fc1, x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention, if there is any, and MLP, each behind a LayerNorm and added; NHWC → NHWC."""

    def __init__(self, dim: int, attn: nn.Module | None, mlp_ratio: float, drop_path: float, **dd: Any):
        super().__init__()
        self.norm1, self.attn = (None, None) if attn is None else (nn.LayerNorm(dim, **dd), attn)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.drop_path(self.attn(cast(nn.LayerNorm, self.norm1)(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Convolution of 4×4 patches and LayerNorm; (B, C, H, W) → (B, dim, ⌈H/4⌉, ⌈W/4⌉), channels-last in memory."""

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_to_multiple(x, 4)))


class Stage(nn.Module):
    """Downsampling and blocks; NCHW → NCHW. Inside, the memory is channels-last, which all its layers prefer."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x.permute(0, 3, 1, 2)


class LITv2(StagedNetwork):
    """LITv2, any input size.

    Args:
        in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate, device, dtype: as in timm.
        dims, depths, num_heads: widths, numbers of blocks and heads of the four stages.
        windows: of each stage's HiLo attention; None is no attention.
        alpha: see `HiLoAttention`.
        mlp_ratio: hidden width of the MLPs over `dims`.
        attn_args: further arguments of `HiLoAttention`, such as `mask_padding`.

    Differences from the authors' code: sizes that patches, merging and windows do not divide are padded (theirs: errors, or in
    their detector padded windows that take part, `attn_args=dict(mask_padding=False)`). Their recipe lets the weight of
    `DeformableTokenMerging.offset` learn at 1/100 of the rate: so does configs/classification/litv2_s_in1k.py.
    """

    truncated = (nn.Linear,)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        windows: tuple[int | None, ...] = (None, None, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_args: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dims[-1]
        drop_path_rates = stochastic_depth(drop_path_rate, depths)

        self.stem = PatchEmbed(in_chans, dims[0], **dd)
        self.feature_info, stages = [], []
        strides = downsampling(len(dims), output_stride)
        for i, (dim, heads, window, (stride, reduction)) in enumerate(zip(dims, num_heads, windows, strides, strict=True)):
            blocks = []
            for rate in drop_path_rates[i]:
                attn = None if window is None else HiLoAttention(dim, heads, window, alpha, **{**dd, **(attn_args or {})})
                blocks.append(Block(dim, attn, mlp_ratio, rate, **dd))
            stages.append(Stage(DeformableTokenMerging(dims[i - 1], dim, stride, **dd) if i else nn.Identity(), blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)


_RENAMES = [  # the authors' names → ours
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"(^|\.)h_(qkv|proj)\.", r"\1hi_\2."),
    (r"(^|\.)l_(q|kv|proj)\.", r"\1lo_\2."),
    (r"(^|\.)dconv\.conv_offset\.", r"\1offset."),
    (r"(^|\.)dconv\.", r"\1"),
    (r"(^|\.)norm_layer\.", r"\1norm."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours, for their models and for a single layer."""
    converted = {}
    for name, value in state_dict.items():
        # their merging ends a stage, ours begins the next one
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.", name)
        converted[renamed(name, _RENAMES)] = value
    return converted


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return dict(
        url=url, num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.proj", classifier="head.fc",
        paper_ids="arXiv:2205.13213", paper_name="Fast Vision Transformers with HiLo Attention",
        license="apache-2.0", origin_url="https://github.com/ziplab/LITv2",
    ) | kwargs


_RELEASE = "https://github.com/ziplab/LITv2/releases/download/v1.0"
default_cfgs = generate_default_cfgs({
    "litv2_nano.untrained": _cfg(),
    "litv2_s.in1k": _cfg(f"{_RELEASE}/litv2_s.pth"),
    "litv2_m.in1k": _cfg(f"{_RELEASE}/litv2_m.pth"),
    "litv2_b.in1k": _cfg(f"{_RELEASE}/litv2_b.pth"),
    "litv2_b_384.in1k": _cfg(f"{_RELEASE}/litv2_b_384.pth", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0,
                               crop_mode="squash"),
})


def _litv2(variant: str, pretrained: bool, **kwargs: Any) -> LITv2:
    return build_model_with_cfg(
        LITv2, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs,
    )


@register_model
def litv2_nano(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """For small images and machines; not in the paper."""
    args = dict(dims=(24, 48, 96, 160), depths=(1, 1, 3, 1), num_heads=(2, 3, 6, 8), alpha=0.7)
    return _litv2("litv2_nano", pretrained, **dict(args, **kwargs))


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _litv2("litv2_s", pretrained, **dict(dict(depths=(2, 2, 6, 2)), **kwargs))


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _litv2("litv2_m", pretrained, **dict(dict(depths=(2, 2, 18, 2)), **kwargs))


_BASE = dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _litv2("litv2_b", pretrained, **dict(_BASE, **kwargs))


@register_model
def litv2_b_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _litv2("litv2_b_384", pretrained, **dict(_BASE, **kwargs))
