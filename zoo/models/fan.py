"""Fully attentional networks, FAN (arXiv 2204.12451), also with token-aware average pooling, TAP-FAN (arXiv 2303.11126).

The authors' checkpoints (https://github.com/NVlabs/FAN, https://github.com/guoyongcs/TAPADL) load as they are:

    timm.create_model("tap_fan_base_16_p4_hybrid", pretrained=True)  # downloads; from a file: pretrained_cfg_overlay=dict(file=...)

Those of FAN are under a licence for non-commercial use, which `zoo fetch NAME --accept-licence` asks about.

TAP-FAN was trained with `zoo.AttentionDiversificationLoss`. Its authors' segmentor of Cityscapes, tapadl_fan_base_segmentation.pth, is
loaded by configs/segmentation/segformer_tap-fan-base_4xb1-160k_cityscapes-1024x1024.py.
"""
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, SelectAdaptivePool2d, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # private, and the only source of it: timm's own families use it
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from timm.models.xcit import ClassAttentionBlock, PositionalEncodingFourier
from torch import Tensor, nn

from zoo.layers import FullyAttentionalBlock
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.staged import StagedNetwork, downsampling, named, patch_conv, truncated_normal_

__all__ = ["Fan", "checkpoint_filter_fn"]

MECHANISM = "tap"
StateDict = dict[str, Tensor]
CONVNEXT_SCALE = 1e-6  # first factor of the hybrids' ConvNeXt blocks
REPORTED_IN = "the authors' README"
REPORTED_TOP1 = {
    "fan_tiny_12_p16_224": 79.2, "fan_small_12_p16_224": 82.5, "fan_base_18_p16_224": 83.6, "fan_large_24_p16_224": 83.9,
    "fan_tiny_8_p4_hybrid": 80.1, "fan_small_12_p4_hybrid": 83.5, "fan_base_16_p4_hybrid": 83.9, "fan_large_16_p4_hybrid": 84.3,
    "tap_fan_base_16_p4_hybrid": 84.3,
}


class UnbiasedLayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W) with the unbiased variance.

    What the authors' ConvNeXt computes for maps that lie channels-last in memory, which all but its first norm get.
    """

    def forward(self, x: Tensor) -> Tensor:
        share = 1 - 1 / self.normalized_shape[0]  # of the unbiased variance that the biased one is
        return F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight * share**0.5, self.bias, self.eps * share).permute(0, 3, 1, 2)


class FanStage(nn.Module):
    """Downsampling, a sine position encoding made for the size of the map, and fully attentional blocks; NCHW → NCHW."""

    def __init__(self, downsample: nn.Module, dim: int, blocks: list[FullyAttentionalBlock], **dd: Any):
        super().__init__()
        self.downsample = downsample
        self.pos_embed = PositionalEncodingFourier(dim=dim, **dd)
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        x = (x + self.pos_embed(1, x.shape[2], x.shape[3])).permute(0, 2, 3, 1).contiguous()
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x.permute(0, 3, 1, 2)


class ClassAttentionHead(nn.Module):
    """Pools a map by a class token that attends to it in some blocks (CaiT, arXiv 2103.17239), or as timm does; norm, classifier.

    (B, C, H, W) → (B, classes); without pooling ("") (B, classes, H, W), and with no classes C in their place.

    `keep_blocks`: the blocks stay also where something else pools, for `attended`.
    """

    cls_token: nn.Parameter | None
    blocks: nn.Sequential | None
    norm: nn.Module

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, num_classes: int, pool_type: str, drop_rate: float,
                 keep_blocks: bool = False, **dd: Any):
        super().__init__()
        self.num_features, self.keep_blocks, self.by_token = dim, keep_blocks, True
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        make = partial(ClassAttentionBlock, dim, num_heads, mlp_ratio, qkv_bias=True, tokens_norm=True,
                       norm_layer=partial(nn.LayerNorm, eps=1e-6), **dd)
        self.blocks = nn.Sequential(make(), make())
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, **dd)
        self.reset_parameters()

    def reset(self, num_classes: int, pool_type: str | None = None, in_features: int | None = None, **dd: Any) -> None:
        if pool_type is not None:
            if pool_type == "token" and self.cls_token is None:
                raise ValueError("the class token is gone: global_pool cannot go back to 'token' from another")
            if pool_type.endswith("catavgmax"):
                raise ValueError(f"global_pool must keep the width, as the norm comes after it, got {pool_type!r}")
            self.by_token = pool_type == "token"
            if not self.by_token:
                if not self.keep_blocks:
                    self.cls_token = self.blocks = None
                self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC")
        self.num_features = in_features or self.num_features
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()
        self.fc.train(self.training)

    def reset_parameters(self) -> None:
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
            for block in cast(Iterable[ClassAttentionBlock], self.blocks):  # whose factors timm has no method for
                nn.init.ones_(cast(Tensor, block.gamma1))
                nn.init.ones_(cast(Tensor, block.gamma2))

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._tokens(x)[:, 0] if self.by_token else self.global_pool(x.permute(0, 2, 3, 1))
        x = self.drop(self.norm(x))
        x = x if pre_logits else self.fc(x)
        is_map = self.cls_token is None and self.global_pool.is_identity()
        return x.permute(0, 3, 1, 2) if is_map else x

    def attended(self, x: Tensor) -> Tensor:
        """The map x as the blocks leave it, (B, C, H, W) → (B, C, H, W)."""
        return self._tokens(x)[:, 1:].unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _tokens(self, x: Tensor) -> Tensor:
        token, blocks = cast(Tensor, self.cls_token), cast(nn.Sequential, self.blocks)  # `reset` keeps both or neither
        return blocks(torch.cat([token.expand(x.shape[0], -1, -1), x.flatten(2).mT], 1))


def _conv_norm(in_chans: int, dim: int, stride: int = 2, **dd: Any) -> dict[str, nn.Module]:
    return dict(conv=nn.Conv2d(in_chans, dim, 3, stride, padding=1, bias=False, **dd), norm=nn.BatchNorm2d(dim, **dd))


class Fan(StagedNetwork):
    """FAN and TAP-FAN, any input size.

    Args:
        in_chans, num_classes, output_stride, drop_rate, drop_path_rate, device, dtype: as in timm; stochastic depth is equally
            strong in all blocks.
        global_pool: "token" for class attention; otherwise as in timm, and without it ("catavgmax" not: a norm comes after it).
        embed_dim, depth, num_heads, mlp_ratio: of the fully attentional blocks, at stride 16.
        num_scales: of `TokenAwareAvgPool` (TAP-FAN); None: no pool.
        hybrid_dims, hybrid_depths: widths and numbers of blocks of the two ConvNeXt stages that embed the patches
            ("hybrid"); None: four 3×3 convolutions of stride 2 do.
        head_init_scale: factor of the classifier's first weights.
        class_attention_map: the fourth feature map is the third as class attention leaves it, as in the authors' segmentation of
            Cityscapes (TAPADL_FAN/segmentation/mmseg/models/backbones/tap_fan.py); needs global_pool
            "token", which `reset_classifier` may change afterwards.

    Features are the maps at strides 4, 8 and 16, and, by default, the last of them max-pooled to stride 32, which what is built on
    four strides reads; with `class_attention_map` a second one at stride 16 in its place. `forward_features` gives the map before
    class attention, which is part of the head.

    Differences from the authors' code (models/fan.py and TAPADL_FAN/models/tap_fan.py there): maps need not be square.
    """

    truncated = (nn.Linear,)
    head: ClassAttentionHead

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 448,
        depth: int = 18,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_scales: int | None = None,
        hybrid_dims: tuple[int, int] | None = None,
        hybrid_depths: tuple[int, int] = (3, 3),
        head_init_scale: float = 1.0,
        class_attention_map: bool = False,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if class_attention_map and global_pool != "token":
            raise ValueError(f"class_attention_map needs global_pool='token', got {global_pool!r}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features, self.head_init_scale = embed_dim, head_init_scale
        self.hybrid = hybrid_dims is not None
        strides, reductions = zip(*downsampling(4, output_stride), strict=True)
        stride = strides[2]
        if hybrid_dims is None:
            dims = embed_dim // 8, embed_dim // 4, embed_dim // 2
            self.stem, *embedding = (named(**_conv_norm(*widths, **dd), act=nn.GELU()) for widths in pairwise((in_chans, *dims)))
            downsample = named(**_conv_norm(dims[-1], embed_dim, stride, **dd))
        else:
            dims = hybrid_dims[0], *hybrid_dims
            self.stem = named(conv=nn.Conv2d(in_chans, dims[0], 4, stride=4, **dd), norm=LayerNorm2d(dims[0], eps=1e-6, **dd))
            embedding = [
                ConvNeXtStage(*dims[i : i + 2], stride=i + 1, depth=hybrid_depths[i], ls_init_value=CONVNEXT_SCALE, conv_mlp=True,
                              norm_layer=partial(UnbiasedLayerNorm2d, eps=1e-6), **dd)
                for i in range(2)]
            downsample = named(**patch_conv(dims[-1], embed_dim, stride, **dd))
        blocks = [FullyAttentionalBlock(embed_dim, num_heads, mlp_ratio, num_scales, drop_path_rate, **dd) for _ in range(depth)]
        self.stages = nn.Sequential(*embedding, FanStage(downsample, embed_dim, blocks, **dd))
        self.coarser = None if class_attention_map else nn.MaxPool2d(2, ceil_mode=True) if strides[3] == 2 else nn.Identity()
        modules = ("stages.0", "stages.1", "stages.2", "head.blocks" if class_attention_map else "coarser")
        self.feature_info = [
            dict(num_chs=width, reduction=reductions[i], module=modules[i]) for i, width in enumerate((*dims[1:], embed_dim, embed_dim))]
        if class_attention_map:
            self.feature_info[-1]["reduction"] = reductions[2]
        self.head = ClassAttentionHead(embed_dim, num_heads, mlp_ratio, num_classes, global_pool, drop_rate, class_attention_map, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        for part in (self.stem, *self.stages[:2]) if self.hybrid else ():
            for conv in (module for module in part.modules() if isinstance(module, nn.Conv2d)):
                truncated_normal_(conv)
        if self.head.cls_token is not None:
            trunc_normal_(self.head.cls_token, std=0.02)
        if isinstance(self.head.fc, nn.Linear):
            self.head.fc.weight.data.mul_(self.head_init_scale)
        if needs_reset:
            for block in (module for module in self.modules() if isinstance(module, ConvNeXtBlock)):
                nn.init.constant_(cast(Tensor, block.gamma), CONVNEXT_SCALE)  # which timm has no method for

    def no_weight_decay(self) -> set[str]:
        return set() if self.head.cls_token is None else {"head.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^head\.(?:cls_token|blocks|norm)", (99999,))]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    def drop_norm(self) -> None:
        self.head.norm = nn.Identity()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        indices, last = feature_take_indices(len(self._levels()), indices)
        if last < len(self.stages):
            self.head.keep_blocks = False
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        return [*super()._levels(), self.head.attended] if self.head.keep_blocks else super()._levels()


_RENAMES = [  # the authors' names → ours
    (r"^patch_embed\.proj\.0\.0\.", "stem.conv."),
    (r"^patch_embed\.proj\.0\.1\.", "stem.norm."),
    (r"^patch_embed\.proj\.2\.0\.", "stages.0.conv."),
    (r"^patch_embed\.proj\.2\.1\.", "stages.0.norm."),
    (r"^patch_embed\.proj\.4\.0\.", "stages.1.conv."),
    (r"^patch_embed\.proj\.4\.1\.", "stages.1.norm."),
    (r"^patch_embed\.proj\.6\.0\.", "stages.2.downsample.conv."),
    (r"^patch_embed\.proj\.6\.1\.", "stages.2.downsample.norm."),
    (r"^patch_embed\.backbone\.stem\.0\.", "stem.conv."),
    (r"^patch_embed\.backbone\.stem\.1\.", "stem.norm."),
    (r"^patch_embed\.backbone\.", ""),
    (r"^patch_embed\.proj\.(?=weight|bias)", "stages.2.downsample.conv."),
    (r"^pos_embed\.", "stages.2.pos_embed."),
    (r"^blocks\.(\d+)\.gamma([12])$", r"blocks.\1.ls\2.gamma"),
    (r"^blocks\.", "stages.2.blocks."),
    (r"(^|\.)dilation_predictor\.proj\.0\.", r"\1pool.conv1."),
    (r"(^|\.)dilation_predictor\.proj\.1\.", r"\1pool.norm."),
    (r"(^|\.)dilation_predictor\.proj\.2\.", r"\1pool.conv2."),
    (r"^cls_token$", "head.cls_token"),
    (r"^cls_attn_blocks\.", "head.blocks."),
    (r"^head\.(?=weight|bias)", "head.fc."),
    (r"^norm\.", "head.norm."),
    (r"(^|\.)(mlp|norm)_v\.", r"\1\2."),
]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours, for their models and for a single layer."""
    return {renamed(name, _RENAMES): value for name, value in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(14, 14), crop_pct=1.0, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.conv", classifier="head.fc", **kwargs)


_FAN = "https://github.com/zhoudaquan/fully_attentional_network_ckpt/releases/download/v1.0.0"
_TAPADL = "https://github.com/guoyongcs/TAPADL/releases/download/v1.0"


def _fan_cfg(file: str = "") -> dict[str, Any]:
    return _cfg(url=f"{_FAN}/{file}" if file else "",
                paper_ids="arXiv:2204.12451", paper_name="Understanding The Robustness in Vision Transformers",
                license="nvidia-source-code-nc", origin_url="https://github.com/NVlabs/FAN")


def _tap_cfg(file: str = "") -> dict[str, Any]:
    return _cfg(url=f"{_TAPADL}/{file}" if file else "",
                paper_ids="arXiv:2303.11126", paper_name="Robustifying Token Attention for Vision Transformers",
                license="mit", origin_url="https://github.com/guoyongcs/TAPADL")


default_cfgs = generate_default_cfgs({
    "fan_tiny_12_p16_224.in1k": _fan_cfg("fan_vit_tiny.pth.tar"),
    "fan_small_12_p16_224.in1k": _fan_cfg("fan_vit_small.pth.tar"),
    "fan_base_18_p16_224.in1k": _fan_cfg("fan_vit_base.pth.tar"),
    "fan_large_24_p16_224.untrained": _fan_cfg(),
    "fan_tiny_8_p4_hybrid.in1k": _fan_cfg("fan_hybrid_tiny.pth.tar"),
    "fan_small_12_p4_hybrid.in1k": _fan_cfg("fan_hybrid_small.pth.tar"),
    "fan_base_16_p4_hybrid.in1k": _fan_cfg("fan_hybrid_base.pth.tar"),
    "fan_large_16_p4_hybrid.untrained": _fan_cfg(),
    "tap_fan_nano.untrained": _tap_cfg(),
    "tap_fan_tiny_12_p16_224.untrained": _tap_cfg(),
    "tap_fan_small_12_p16_224.untrained": _tap_cfg(),
    "tap_fan_base_18_p16_224.untrained": _tap_cfg(),
    "tap_fan_large_24_p16_224.untrained": _tap_cfg(),
    "tap_fan_tiny_8_p4_hybrid.untrained": _tap_cfg(),
    "tap_fan_small_12_p4_hybrid.untrained": _tap_cfg(),
    "tap_fan_base_16_p4_hybrid.in1k": _tap_cfg("tapadl_fan_base.pth.tar"),
    "tap_fan_large_16_p4_hybrid.untrained": _tap_cfg(),
})
PLAIN = [name.partition(".")[0] for name in default_cfgs if name.startswith("fan_")]  # without token-aware average pooling


def _fan(variant: str, pretrained: bool, **kwargs: Any) -> Fan:
    return build_model_with_cfg(
        Fan, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"), **kwargs,
    )


_TAP = dict(num_scales=4)
_HYBRID = dict(hybrid_dims=(128, 256), hybrid_depths=(3, 3))


@register_model
def fan_tiny_12_p16_224(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=192, depth=12, num_heads=4)
    return _fan("fan_tiny_12_p16_224", pretrained, **dict(args, **kwargs))


@register_model
def fan_small_12_p16_224(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=384, depth=12, num_heads=8)
    return _fan("fan_small_12_p16_224", pretrained, **dict(args, **kwargs))


@register_model
def fan_base_18_p16_224(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=448, depth=18, num_heads=8)
    return _fan("fan_base_18_p16_224", pretrained, **dict(args, **kwargs))


@register_model
def fan_large_24_p16_224(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=480, depth=24, num_heads=10)
    return _fan("fan_large_24_p16_224", pretrained, **dict(args, **kwargs))


@register_model
def fan_tiny_8_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=192, depth=8, num_heads=8, **_HYBRID)
    return _fan("fan_tiny_8_p4_hybrid", pretrained, **dict(args, **kwargs))


@register_model
def fan_small_12_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> Fan:
    """Ten blocks, whatever its name says."""
    args = dict(embed_dim=384, depth=10, num_heads=8, **_HYBRID)
    return _fan("fan_small_12_p4_hybrid", pretrained, **dict(args, **kwargs))


@register_model
def fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=448, depth=16, num_heads=8, **_HYBRID)
    return _fan("fan_base_16_p4_hybrid", pretrained, **dict(args, **kwargs))


@register_model
def fan_large_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> Fan:
    """Twenty-two blocks, whatever its name says."""
    args = dict(embed_dim=480, depth=22, num_heads=10, hybrid_dims=(128, 256), hybrid_depths=(3, 5), head_init_scale=0.001)
    return _fan("fan_large_16_p4_hybrid", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_nano(pretrained: bool = False, **kwargs: Any) -> Fan:
    """For small images and machines; not in the papers."""
    args = dict(embed_dim=96, depth=4, num_heads=4, **_TAP)
    return _fan("tap_fan_nano", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_tiny_12_p16_224(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=192, depth=12, num_heads=4, **_TAP)
    return _fan("tap_fan_tiny_12_p16_224", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_small_12_p16_224(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=384, depth=12, num_heads=8, **_TAP)
    return _fan("tap_fan_small_12_p16_224", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_base_18_p16_224(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=448, depth=18, num_heads=8, **_TAP)
    return _fan("tap_fan_base_18_p16_224", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_large_24_p16_224(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=480, depth=24, num_heads=10, **_TAP)
    return _fan("tap_fan_large_24_p16_224", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_tiny_8_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=192, depth=8, num_heads=8, **_HYBRID, **_TAP)
    return _fan("tap_fan_tiny_8_p4_hybrid", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_small_12_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> Fan:
    """Ten blocks, whatever its name says."""
    args = dict(embed_dim=384, depth=10, num_heads=8, **_HYBRID, **_TAP)
    return _fan("tap_fan_small_12_p4_hybrid", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> Fan:
    args = dict(embed_dim=448, depth=16, num_heads=8, **_HYBRID, **_TAP)
    return _fan("tap_fan_base_16_p4_hybrid", pretrained, **dict(args, **kwargs))


@register_model
def tap_fan_large_16_p4_hybrid(pretrained: bool = False, **kwargs: Any) -> Fan:
    """Twenty-two blocks, whatever its name says."""
    args = dict(embed_dim=480, depth=22, num_heads=10, hybrid_dims=(128, 256), hybrid_depths=(3, 5), head_init_scale=0.001, **_TAP)
    return _fan("tap_fan_large_16_p4_hybrid", pretrained, **dict(args, **kwargs))
