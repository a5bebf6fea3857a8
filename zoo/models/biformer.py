"""BiFormer (arXiv 2303.08810): bi-level routing attention in three stages, attention over the whole map in the fourth.

The authors' checkpoints (MIT licence; https://github.com/rayleizhu/BiFormer) load as they are:

    timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=dict(file="biformer_tiny_best.pth"))

No address is registered: all of their links end in the same file name, under which torch's cache would confuse them.
"""
import re
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, register_notrace_module
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.layers import BiLevelRoutingAttention
from zoo.layers._attention import attend
from zoo.layers._linear import linear
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.staged import StagedNetwork, downsampling, named, patch_conv, stochastic_depth

__all__ = ["BiFormer", "GlobalAttention", "checkpoint_filter_fn"]

MECHANISM = "routing"
StateDict = dict[str, Tensor]
REPORTED_IN = "the authors' README"
REPORTED_TOP1 = {
    "biformer_tiny": 81.4, "biformer_small": 83.8, "biformer_base": 84.3, "biformer_stl": 82.7, "biformer_stl_nchw": 82.7,
}


@register_notrace_module
class GlobalAttention(nn.Module):
    """Multi-head attention over the whole map plus a depthwise 5×5 convolution, the last stage of BiFormer.

        out = proj(softmax(Q Kᵀ / √d) V + dwconv(X))

    (B, H, W, C) → (B, H, W, C). No bias in the query, key and value projection.

    Args:
        lepe_of_values: the convolution reads the values (the authors' refactored STL model) instead of the input.
        device, dtype: of the parameters, as in torch.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, lepe_of_values: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_heads, self.lepe_of_values = num_heads, lepe_of_values
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        b, height, width, c = x.shape
        qkv = linear(self.qkv, x)
        heads = (b, height * width, self.num_heads, c // self.num_heads)
        q, k, v = (y.reshape(heads).transpose(1, 2) for y in qkv.split(c, -1))
        out = attend(q, k, v).transpose(1, 2).reshape(b, height, width, c)
        lepe_input = qkv[..., 2 * c :] if self.lepe_of_values else x
        return linear(self.proj, out + self.lepe(lepe_input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), NHWC → NHWC."""

    def __init__(self, dim: int, hidden: int, **dd: Any):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden, **dd), nn.GELU(), nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.fc2, self.act(linear(self.fc1, x)))


class Block(nn.Module):
    """x + dwconv3×3(x), then attention and MLP, each behind a LayerNorm and added; NHWC → NHWC."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, pos_embed: bool, **dd: Any):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


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


def _conv_stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    return named(
        conv1=nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd), norm1=nn.BatchNorm2d(dim // 2, **dd), act=nn.GELU(),
        conv2=nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd), norm2=nn.BatchNorm2d(dim, **dd),
    )


class BiFormer(StagedNetwork):
    """BiFormer, any input size.

    Args:
        in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate, device, dtype: as in timm.
        dims, depths: widths and numbers of blocks of the four stages.
        topks: regions routed to in each stage; None is attention over the whole map (`GlobalAttention`, 8 heads).
        head_dim: width of a head of the routing stages.
        mlp_ratio: hidden width of the MLPs over `dims`, one for all stages or one each.
        swin_layout: the STL variant: patch embedding and merging by 4×4 and 2×2 convolutions, no convolutional position embedding.
        lepe_of_values: see `GlobalAttention`.
        attn_args: further arguments of `BiLevelRoutingAttention`, such as `regions` or `mask_padding`. A list holds one per stage.

    Differences from the authors' code: sizes that the 7×7 grid of regions does not divide are padded and masked
    (theirs: an error, or with `attn_args=dict(mask_padding=False)` padding that takes part).
    """

    truncated = (nn.Linear,)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        topks: tuple[int | None, ...] = (1, 4, 16, None),
        head_dim: int = 32,
        mlp_ratio: float | tuple[float, ...] = 3.0,
        swin_layout: bool = False,
        lepe_of_values: bool = False,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_args: dict[str, Any] | list[dict[str, Any]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dims[-1]
        drop_path_rates = stochastic_depth(drop_path_rate, depths)
        mlp_ratios = mlp_ratio if isinstance(mlp_ratio, (list, tuple)) else [mlp_ratio] * len(dims)
        attn_args = attn_args if isinstance(attn_args, list) else [attn_args or {}] * len(dims)

        if swin_layout:
            self.stem = named(conv1=nn.Conv2d(in_chans, dims[0], 4, stride=4, **dd), norm1=nn.BatchNorm2d(dims[0], **dd))
        else:
            self.stem = _conv_stem(in_chans, dims[0], **dd)
        self.feature_info, stages = [], []
        strides = downsampling(len(dims), output_stride)
        for i, (dim, topk, ratio, (stride, reduction)) in enumerate(zip(dims, topks, mlp_ratios, strides, strict=True)):
            if i == 0:
                downsample: nn.Module = nn.Identity()
            elif swin_layout:
                downsample = named(norm=nn.BatchNorm2d(dims[i - 1], **dd), **patch_conv(dims[i - 1], dim, stride, **dd))
            else:
                downsample = named(conv=nn.Conv2d(dims[i - 1], dim, 3, stride, padding=1, **dd), norm=nn.BatchNorm2d(dim, **dd))
            if topk is None:
                attention = partial(GlobalAttention, dim, lepe_of_values=lepe_of_values, **dd)
            else:
                attention = partial(BiLevelRoutingAttention, dim, **{"num_heads": dim // head_dim, "topk": topk, **dd, **attn_args[i]})
            blocks = [Block(dim, attention(), ratio, rate, not swin_layout, **dd) for rate in drop_path_rates[i]]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)


_RENAMES = [  # the authors' names → ours
    (r"^downsample_layers\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.4\.", "stem.norm2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"(^|\.)qkv\.qkv\.", r"\1qkv."),
    (r"(^|\.)qkv_linear\.", r"\1qkv."),
    (r"(^|\.)(wo|output_linear)\.", r"\1proj."),
    (r"(^|\.)router\.emb\.", r"\1router."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names and shapes → ours, for their models and for a single layer (also their refactored NCHW one)."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    converted = {}
    for name, value in state_dict.items():
        merging = re.match(r"^downsample_layers\.([1-9])\.([01])\.(.*)", name)
        if merging:  # convolution then norm, or in the Swin layout norm then convolution
            stage, position, rest = merging.groups()
            is_conv = state_dict[f"downsample_layers.{stage}.{position}.weight"].ndim == 4
            name = f"stages.{stage}.downsample.{'conv' if is_conv else 'norm'}.{rest}"
        name = renamed(name, _RENAMES)
        if value.ndim == 4 and value.shape[2:] == (1, 1) and len(shapes.get(name, ())) == 2:
            value = value.flatten(1)  # a 1×1 convolution is a linear layer
        converted[name] = value
    return converted


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.conv1", classifier="head.fc",
        paper_ids="arXiv:2303.08810", paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        license="mit", origin_url="https://github.com/rayleizhu/BiFormer", **kwargs,
    )


default_cfgs = generate_default_cfgs({
    "biformer_nano.untrained": _cfg(),
    "biformer_tiny.in1k": _cfg(),
    "biformer_small.in1k": _cfg(),
    "biformer_base.in1k": _cfg(),
    "biformer_stl.in1k": _cfg(),
    "biformer_stl_nchw.in1k": _cfg(),
})


def _biformer(variant: str, pretrained: bool, **kwargs: Any) -> BiFormer:
    return build_model_with_cfg(
        BiFormer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs,
    )


@register_model
def biformer_nano(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """For small images and machines; not in the paper."""
    args = dict(dims=(32, 64, 128, 192), depths=(1, 1, 3, 1), head_dim=16)
    return _biformer("biformer_nano", pretrained, **dict(args, **kwargs))


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return _biformer("biformer_tiny", pretrained, **dict(dict(depths=(2, 2, 8, 2)), **kwargs))


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return _biformer("biformer_small", pretrained, **dict(dict(depths=(4, 4, 18, 4)), **kwargs))


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    args = dict(dims=(96, 192, 384, 768), depths=(4, 4, 18, 4))
    return _biformer("biformer_base", pretrained, **dict(args, **kwargs))


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """In the layout of Swin-T, for ablations."""
    args = dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), mlp_ratio=4.0, swin_layout=True)
    return _biformer("biformer_stl", pretrained, **dict(args, **kwargs))


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """The authors' refactored and retrained `biformer_stl`: its last stage's depthwise convolution reads the values."""
    args = dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), mlp_ratio=4.0, swin_layout=True, lepe_of_values=True)
    return _biformer("biformer_stl_nchw", pretrained, **dict(args, **kwargs))
