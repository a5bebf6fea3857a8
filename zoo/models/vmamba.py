"""VMamba (arXiv 2401.10166), the first version: maps are scanned in four orders, no attention and no MLPs.

The authors' checkpoints of January 2024 (MIT licence; https://github.com/MzeroMiko/VMamba), those that SUM starts from, load as they are:

    timm.create_model("vmamba_small_v0", pretrained=True, pretrained_cfg_overlay=dict(file="vssmsmall_dp03_ckpt_epoch_238.pth"))
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, register_notrace_function
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels._exporting import at_least, is_exporting
from zoo.layers import SelectiveScan2d
from zoo.layers._linear import linear
from zoo.layers._tracing import notrace_module
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.staged import StagedNetwork, downsampling, stochastic_depth

__all__ = ["PatchMerging", "VMamba", "VSSBlock", "checkpoint_filter_fn"]

MECHANISM = "ss2d"
StateDict = dict[str, Tensor]
PATCH = 4
UNDECAYED = ("A_logs", "Ds")


class VSSBlock(nn.Module):
    """x + SS2D(LayerNorm(x)), with stochastic depth; NHWC → NHWC.

    Args:
        dim: the width.
        state_dim: of `SelectiveScan2d`.
        eps: of the LayerNorm; the authors' is 1e-6 where the block is made alone, and 1e-5 in their networks.
        drop_path: the rate at which the block is left out of a picture's way in training.
    """

    def __init__(self, dim: int, state_dim: int = 16, eps: float = 1e-5, drop_path: float = 0.0, **dd: Any):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim, eps=eps, **dd), SelectiveScan2d(dim, state_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.attn(self.norm(x)))


@notrace_module
class PatchMerging(nn.Module):
    """Two by two positions beside one another, LayerNorm, a linear layer: (B, H, W, dim) → (B, ⌊H/2⌋, ⌊W/2⌋, out_dim).

    Their order is down first, then to the right. Of odd sizes the last row or column is lost, as in the authors' code, where maps of one
    row or column end; here such a row stands for both. With stride 1 every position has its neighbours, and the map keeps its size; what
    lies beyond the last row and column are these again.
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 2, **dd: Any):
        super().__init__()
        self.stride = stride
        self.norm, self.reduction = nn.LayerNorm(4 * dim, **dd), nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.reduction, self.norm(_neighbours(x, self.stride)))


def _neighbours(x: Tensor, stride: int) -> Tensor:
    """(B, H, W, C) → (B, H / stride, W / stride, 4 C), of each the (upper left, lower left, upper right, lower right)."""
    batch, height, width, channels = x.shape
    if is_exporting() or stride == 1 or height == 1 or width == 1:  # by index, which asks nothing of the sizes
        for axis, n in ((1, height), (2, width)):
            first = stride * torch.arange(at_least(n // stride, 1), device=x.device)
            x = torch.cat([x.index_select(axis, (first + i).clamp(max=n - 1)) for i in range(2)], -1)
        return x
    rows, columns = height // 2, width // 2
    x = x.narrow(1, 0, 2 * rows).narrow(2, 0, 2 * columns).reshape(batch, rows, 2, columns, 2, channels)
    return x.permute(0, 1, 3, 4, 2, 5).reshape(batch, rows, columns, 4 * channels)


class PatchEmbed(nn.Module):
    """Convolution of 4×4 patches and LayerNorm; (B, C, H, W) → (B, dim, ⌊H/4⌋, ⌊W/4⌋), of at least one patch."""

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, PATCH, stride=PATCH, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(at_least_a_patch(x)))


@register_notrace_function
def at_least_a_patch(x: Tensor) -> Tensor:
    """x, its last row and column again where they are fewer than a patch has. Exported graphs take images of a patch at least."""
    height, width = x.shape[2:]
    if is_exporting() or height >= PATCH and width >= PATCH:
        return x
    return F.pad(x, (0, max(PATCH - width, 0), 0, max(PATCH - height, 0)), mode="replicate")


class Stage(nn.Module):
    """Merging, or nothing in the first stage, and blocks; NCHW → NCHW. Inside, channels are last in memory."""

    def __init__(self, downsample: nn.Module, blocks: list[VSSBlock]):
        super().__init__()
        self.downsample, self.blocks = downsample, nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return self.scanned(self.entered(x)).permute(0, 3, 1, 2)

    def entered(self, x: Tensor) -> Tensor:
        """What the blocks are given, (B, H, W, C)."""
        return self.downsample(x.permute(0, 2, 3, 1).contiguous())

    def scanned(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x


class VMamba(StagedNetwork):
    """VMamba, first version, any input size.

    Args:
        in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate, device, dtype: as in timm.
        dims, depths: widths and numbers of blocks of the stages.
        state_dim: see `SelectiveScan2d`.

    Sizes that patches and merging do not divide lose their last rows and columns, as in the authors' code; smaller images than it takes
    have their last ones repeated. Stochastic depth is off unless asked for (theirs: 0.2 and, of the small one, 0.3).
    """

    truncated = (nn.Linear,)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        state_dim: int = 16,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if len(dims) != len(depths):
            raise ValueError(f"dims and depths must be of the same stages, got {tuple(dims)} and {tuple(depths)}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dims[-1]
        self.stem = PatchEmbed(in_chans, dims[0], **dd)
        self.feature_info, stages = [], []
        rates_of_stages, strides = stochastic_depth(drop_path_rate, depths), downsampling(len(dims), output_stride)
        for i, (dim, rates, (stride, reduction)) in enumerate(zip(dims, rates_of_stages, strides, strict=True)):
            blocks = [VSSBlock(dim, state_dim, drop_path=rate, **dd) for rate in rates]
            stages.append(Stage(PatchMerging(dims[i - 1], dim, stride, **dd) if i else nn.Identity(), blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(UNDECAYED)}


_RENAMES = [  # the authors' names → ours
    (r"^patch_embed\.", "stem."),
    (r"(^|\.)ln_1\.", r"\1norm."),
    (r"(^|\.)self_attention\.", r"\1attn."),
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),  # theirs ends a stage, ours begins one
    (r"^layers\.(\d+)\.", r"stages.\1."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours, for their models and for a single layer or block."""
    return {renamed(name, _RENAMES): value for name, value in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.proj", classifier="head.fc", license="mit",
        origin_url="https://github.com/MzeroMiko/VMamba", paper_ids="arXiv:2401.10166", paper_name="VMamba: Visual State Space Model",
    ) | kwargs


default_cfgs = generate_default_cfgs({
    "vmamba_nano_v0.untrained": _cfg(),
    "vmamba_tiny_v0.in1k": _cfg(),
    "vmamba_small_v0.in1k": _cfg(),
})


def _vmamba(variant: str, pretrained: bool, **kwargs: Any) -> VMamba:
    return build_model_with_cfg(
        VMamba, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs,
    )


@register_model
def vmamba_nano_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """For small images and machines; not in the paper."""
    return _vmamba("vmamba_nano_v0", pretrained, **dict(dict(dims=(24, 48, 96, 160), depths=(1, 1, 2, 1), state_dim=4), **kwargs))


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    return _vmamba("vmamba_tiny_v0", pretrained, **dict(dict(depths=(2, 2, 9, 2)), **kwargs))


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    return _vmamba("vmamba_small_v0", pretrained, **dict(dict(depths=(2, 2, 27, 2)), **kwargs))
