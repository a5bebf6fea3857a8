"""TransNeXt (arXiv 2311.17132), and MoH-ViT (arXiv 2410.11842), TransNeXt whose tokens pick their heads.

Aggregated attention in three stages, attention of all positions in the fourth, gated MLPs with a convolution; any input size, without the
CUDA extension that the authors' code is fast with. The authors' checkpoints (Apache 2.0 licences; https://github.com/SkyworkAI/MoH,
https://github.com/DaiShiResearch/TransNeXt) load as they are, TransNeXt's also from their addresses:

    timm.create_model("transnext_tiny", pretrained=True)
    timm.create_model("moh_transnext_small_75", checkpoint_path="moh_vit_s_75.pth")
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.layers import AggregatedAttention, LengthScaledAttention
from zoo.layers._initialization import fan_out_normal_
from zoo.layers._linear import linear
from zoo.layers._tracing import notrace_module
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.staged import StagedNetwork, downsampling, stochastic_depth

__all__ = ["ConvGlu", "TransNeXt", "checkpoint_filter_fn"]

MECHANISM = "moh"
PLAIN = ("transnext_micro", "transnext_tiny", "transnext_small", "transnext_base", "transnext_small_384", "transnext_base_384")
StateDict = dict[str, Tensor]
REPORTED_IN = "the papers"
REPORTED_TOP1 = {
    "moh_transnext_small_80": 84.7, "moh_transnext_small_75": 84.6, "moh_transnext_base_75": 84.9, "moh_transnext_base_50": 84.7,
    "transnext_micro": 82.5, "transnext_tiny": 84.0, "transnext_small": 84.7, "transnext_base": 84.8,
    "transnext_small_384": 86.0, "transnext_base_384": 86.2,
}


@notrace_module
class ConvGlu(nn.Module):
    """fc2(GELU(dwconv3×3(a)) · g), with a and g the halves of fc1(x); NHWC → NHWC."""

    def __init__(self, dim: int, hidden: int, **dd: Any):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        a, gate = linear(self.fc1, x).chunk(2, -1)
        a = self.dwconv(a.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return linear(self.fc2, F.gelu(a) * gate)


class Block(nn.Module):
    """Attention and gated MLP, each behind a LayerNorm and added; NHWC → NHWC."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, **dd: Any):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6, **dd), attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvGlu(dim, 2 * int(dim * mlp_ratio) // 3, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Convolution of overlapping patches and LayerNorm; (B, C, H, W) → (B, dim, ⌈H / stride⌉, ⌈W / stride⌉)."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, **dd: Any):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Stage(nn.Module):
    """Downsampling, blocks and a norm; NCHW → NCHW. Inside, the memory is channels-last, which all its layers prefer."""

    def __init__(self, downsample: nn.Module, blocks: list[Block], dim: int, **dd: Any):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return self.norm(x).permute(0, 3, 1, 2)


class TransNeXt(StagedNetwork):
    """TransNeXt, any input size.

    Args:
        in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate, device, dtype: as in timm.
        dims, depths, num_heads: widths, numbers of blocks and heads of the four stages.
        mlp_ratios: of each stage; the gated MLP's hidden width is two thirds of that times its width.
        sr_ratios: of each stage's `AggregatedAttention`; None is `LengthScaledAttention`.
        shared_heads, active_heads: of each stage, the heads that are active for every token, and how many of the others are (see
            `zoo.layers.MixtureOfHeads`); None: no gates, as in TransNeXt.
        pretrain_size: side of the images of pretraining, which offsets of positions are measured by, also at other sizes; at least 64.

    Differences from the authors' code: the size is the image's, not the network's; features are those after each stage's norm, as in their
    detectors. Stochastic depth is off unless asked for (theirs: 0.15 to 0.7).
    """

    truncated = (nn.Linear,)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (72, 144, 288, 576),
        depths: Sequence[int] = (5, 5, 22, 5),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int | None] = (8, 4, 2, None),
        shared_heads: Sequence[int] | None = None,
        active_heads: Sequence[int] | None = None,
        pretrain_size: int = 224,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if (shared_heads is None) != (active_heads is None):
            raise ValueError(f"shared_heads and active_heads are given together, got {shared_heads} and {active_heads}")
        if pretrain_size < 64:
            raise ValueError(f"pretrain_size must be at least 64, got {pretrain_size}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dims[-1]
        drop_path_rates = stochastic_depth(drop_path_rate, depths)

        self.stem = PatchEmbed(in_chans, dims[0], 7, 4, **dd)
        self.feature_info, stages = [], []
        for i, (dim, (stride, reduction)) in enumerate(zip(dims, downsampling(len(dims), output_stride), strict=True)):
            sides = (pretrain_size // 2 ** (i + 2),) * 2
            heads: dict[str, Any] = dict(num_heads=num_heads[i], pretrain_size=sides, **dd)
            if shared_heads is not None and active_heads is not None:
                heads |= dict(shared_heads=shared_heads[i], active_heads=active_heads[i])
            blocks, sr_ratio = [], sr_ratios[i]
            for rate in drop_path_rates[i]:
                attn = (LengthScaledAttention(dim, **heads) if sr_ratio is None
                        else AggregatedAttention(dim, sr_ratio=sr_ratio, **heads))
                blocks.append(Block(dim, attn, mlp_ratios[i], rate, **dd))
            stages.append(Stage(PatchEmbed(dims[i - 1], dim, 3, stride, **dd) if i else nn.Identity(), blocks, dim, **dd))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out_normal_(module)

    def no_weight_decay(self) -> set[str]:
        kept = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {name for name, _ in self.named_parameters() if any(part in name for part in kept)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        matcher = super().group_matcher(coarse)
        if not coarse:
            matcher["blocks"] = [*matcher["blocks"], (r"^stages\.(\d+)\.norm", (99999,))]
        return matcher


_RENAMES = [  # the authors' names → ours
    (r"^patch_embed1\.", "stem."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"(^|\.)wg_0\.", r"\1router.kinds."),
    (r"(^|\.)wg_1\.", r"\1router.shared."),
    (r"(^|\.)wg\.", r"\1router.routed."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]
_STAGES = [(r"^block{}\.", "stages.{}.blocks."), (r"^norm{}\.", "stages.{}.norm."), (r"^patch_embed{}\.", "stages.{}.downsample.")]
for _i in range(1, 5):  # theirs count from one
    _RENAMES += [(theirs.format(_i), ours.format(_i - 1)) for theirs, ours in _STAGES]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours, for their models and for a single layer."""
    return {renamed(name, _RENAMES): value for name, value in state_dict.items()}


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return dict(
        url=url, num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.proj", classifier="head.fc", license="apache-2.0",
    ) | kwargs


def _moh(**kwargs: Any) -> dict[str, Any]:
    return _cfg(paper_ids="arXiv:2410.11842", paper_name="MoH: Multi-Head Attention as Mixture-of-Head Attention",
                origin_url="https://github.com/SkyworkAI/MoH", **kwargs)


def _transnext(name: str, **kwargs: Any) -> dict[str, Any]:
    url = f"https://huggingface.co/DaiShiResearch/transnext-{name}/resolve/main/transnext_{name.replace('-', '_')}.pth"
    return _cfg(url, paper_ids="arXiv:2311.17132", paper_name="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
                origin_url="https://github.com/DaiShiResearch/TransNeXt", **kwargs)


_AT_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)
default_cfgs = generate_default_cfgs({
    "moh_transnext_nano.untrained": _moh(),
    "moh_transnext_small_80.in1k": _moh(),
    "moh_transnext_small_75.in1k": _moh(),
    "moh_transnext_base_75.in1k": _moh(),
    "moh_transnext_base_50.in1k": _moh(),
    "transnext_micro.in1k": _transnext("micro-224-1k"),
    "transnext_tiny.in1k": _transnext("tiny-224-1k"),
    "transnext_small.in1k": _transnext("small-224-1k"),
    "transnext_base.in1k": _transnext("base-224-1k"),
    "transnext_small_384.in1k": _transnext("small-384-1k-ft-1k", **_AT_384),
    "transnext_base_384.in1k": _transnext("base-384-1k-ft-1k", **_AT_384),
})


def _model(variant: str, pretrained: bool, **kwargs: Any) -> TransNeXt:
    return build_model_with_cfg(
        TransNeXt, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs,
    )


_SMALL = dict(dims=(72, 144, 288, 576), depths=(5, 5, 22, 5), num_heads=(3, 6, 12, 24))
_BASE = dict(dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), num_heads=(4, 8, 16, 32))


@register_model
def moh_transnext_nano(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """For small images and machines; not in the papers."""
    args = dict(dims=(24, 48, 96, 160), depths=(1, 1, 3, 1), num_heads=(2, 3, 6, 8), mlp_ratios=(4, 4, 4, 4),
                shared_heads=(2, 1, 2, 2), active_heads=(0, 1, 2, 3))
    return _model("moh_transnext_nano", pretrained, **dict(args, **kwargs))


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    args = dict(_SMALL, shared_heads=(3, 6, 3, 8), active_heads=(0, 0, 6, 12))
    return _model("moh_transnext_small_80", pretrained, **dict(args, **kwargs))


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    args = dict(_SMALL, shared_heads=(3, 6, 3, 4), active_heads=(0, 0, 6, 12))
    return _model("moh_transnext_small_75", pretrained, **dict(args, **kwargs))


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    args = dict(_BASE, shared_heads=(4, 8, 4, 5), active_heads=(0, 0, 8, 16))
    return _model("moh_transnext_base_75", pretrained, **dict(args, **kwargs))


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    args = dict(_BASE, shared_heads=(2, 2, 2, 4), active_heads=(2, 4, 6, 8))
    return _model("moh_transnext_base_50", pretrained, **dict(args, **kwargs))


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    args = dict(dims=(48, 96, 192, 384), depths=(2, 2, 15, 2), num_heads=(2, 4, 8, 16))
    return _model("transnext_micro", pretrained, **dict(args, **kwargs))


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return _model("transnext_tiny", pretrained, **dict(dict(_SMALL, depths=(2, 2, 15, 2)), **kwargs))


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return _model("transnext_small", pretrained, **dict(_SMALL, **kwargs))


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return _model("transnext_base", pretrained, **dict(_BASE, **kwargs))


@register_model
def transnext_small_384(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return _model("transnext_small_384", pretrained, **dict(_SMALL, **kwargs))


@register_model
def transnext_base_384(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return _model("transnext_base_384", pretrained, **dict(_BASE, **kwargs))
