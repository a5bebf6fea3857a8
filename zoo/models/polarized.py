"""ResNets and HRNets with polarized self-attention (arXiv 2107.00782), in the parallel (`_p`) or sequential (`_s`) layout.

timm's own networks with `PolarizedSelfAttention` after the first 3×3 convolution (and its norm and activation) of every
residual block (paper, section 4); in HRNets of the basic blocks, as in the authors' code. They published weights of whole
segmentation networks only (Apache-2.0; https://github.com/DeLightCMU/PSA): the part of their HRNet with OCR that is the backbone
loads as it is into `polarized_hrnet_w48_s` with `head=""` and `fuse="bilinear"`. timm's weights load into everything but the new
layers, which keep their initial values:

    timm.create_model("polarized_resnet50_s", pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id="timm/resnet50.a1_in1k"))
"""
from collections.abc import Iterable
from functools import partial, reduce
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, get_device_dtype
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.hrnet import HighResolutionModule, HighResolutionNet, cfg_cls
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from zoo.layers import PolarizedSelfAttention
from zoo.layers.polarized import Layout
from zoo.models.building import build_model_with_cfg
from zoo.models.staged import Reinitialized

__all__ = ["PolarizedHRNet", "PolarizedResNet", "checkpoint_filter_fn"]

MECHANISM = "polarized"
ATTACHABLE = PolarizedSelfAttention
Fuse = Literal["nearest", "bilinear"]
_SLOT = "aa"  # timm's place after the first 3×3 convolution of a block, otherwise for the blur that anti-aliases a stride


def _polarize(model: nn.Module, blocks: tuple[type[BasicBlock | Bottleneck], ...], layout: Layout) -> None:
    """Puts the attention into every block of these types."""
    for block in [module for module in model.modules() if isinstance(module, blocks)]:
        conv = block.conv1 if isinstance(block, BasicBlock) else block.conv2
        attention = PolarizedSelfAttention(conv.out_channels, layout, **get_device_dtype(conv))
        blur = getattr(block, _SLOT)
        setattr(block, _SLOT, attention if isinstance(blur, nn.Identity) else nn.Sequential(blur, attention))


class PolarizedResNet(Reinitialized, ResNet):
    """timm's ResNet with polarized self-attention, any input size.

    Args: timm's, and
        layout: of the attention, "parallel" or "sequential".
    """

    added = PolarizedSelfAttention

    def __init__(self, *args: Any, layout: Layout = "parallel", **kwargs: Any):
        super().__init__(*args, **kwargs)
        _polarize(self, (BasicBlock, Bottleneck), layout)

    def no_weight_decay(self) -> set[str]:
        return set()


class _FusedBranches(nn.Module):
    """timm's `HighResolutionModule` for maps of any size: what comes from below is resized to the map it is added to."""

    fuse: Fuse = "nearest"

    def __init__(self, module: HighResolutionModule):
        super().__init__()
        self.branches, self.fuse_layers, self.fuse_act = module.branches, cast(nn.ModuleList, module.fuse_layers), module.fuse_act
        self.grad_checkpointing = False

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if self.grad_checkpointing:
            return checkpoint(self._run, maps)
        return self._run(maps)

    def _run(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        return [
            self.fuse_act(reduce(torch.add, [self._resized(j, fuse[j], maps, i) for j in range(len(maps))]))
            for i, fuse in enumerate(cast(Iterable[nn.ModuleList], self.fuse_layers))]

    def _resized(self, j: int, fuse: nn.Module, maps: list[Tensor], i: int) -> Tensor:
        if j <= i:
            return fuse(maps[j])
        conv, norm, _ = cast(nn.Sequential, fuse)
        return F.interpolate(norm(conv(maps[j])), size=maps[i].shape[2:], mode=self.fuse)


class PolarizedHRNet(Reinitialized, HighResolutionNet):
    """timm's HRNet with polarized self-attention in its basic blocks, and what timm's lacks: any input size (timm: multiples
    of 32, where both agree), stochastic depth, gradient checkpointing, and the initial zeros of its ResNet in the last norm
    of every residual branch, without which untrained outputs reach 1e7.

    Args: timm's, and
        layout: of the attention, "parallel" or "sequential".
        drop_path_rate: as in timm's ResNet, growing with depth.
        fuse: how coarser maps are interpolated to finer ones: "nearest", which timm's weights for ImageNet were trained with, or
            "bilinear" (align_corners=False), as in the segmentation networks of PSA's authors
            (semantic-segmentation/network/hrnetv2.py) and of mmsegmentation.
            Weights trained with one give wrong features with the other.

    Raises ValueError for another `layout` or `fuse`.
    """

    added = PolarizedSelfAttention

    def __init__(self, cfg: dict[str, Any], *args: Any, layout: Layout = "parallel", drop_path_rate: float = 0.0,
                 fuse: Fuse = "nearest", **kwargs: Any):
        if fuse not in get_args(Fuse):
            raise ValueError(f"fuse must be one of {', '.join(get_args(Fuse))}, got {fuse!r}")
        super().__init__(cfg, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, _FusedBranches):
                module.fuse = fuse
        self.fuse = fuse
        self.grad_checkpointing = False
        _polarize(self, (BasicBlock,), layout)
        for rate, blocks in self._depths(drop_path_rate):
            for block in blocks:
                block.drop_path = DropPath(rate) if rate else None

    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset=needs_reset)
        for module in self.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                module.zero_init_last()

    def _make_stage(self, *args: Any, **kwargs: Any) -> tuple[nn.Sequential, list[int]]:
        stage, channels = super()._make_stage(*args, **kwargs)
        for i, module in enumerate(stage):
            stage[i] = _FusedBranches(cast(HighResolutionModule, module))
        return stage, channels

    def _depths(self, drop_path_rate: float) -> list[tuple[float, list[Any]]]:
        """Residual blocks of the same depth, with their rate of stochastic depth."""
        levels = [[block] for block in self.layer1]
        for module in [*self.stage2, *self.stage3, *self.stage4]:
            levels += [list(blocks) for blocks in zip(*cast(_FusedBranches, module).branches, strict=True)]
        return [(drop_path_rate * depth / (len(levels) - 1), blocks) for depth, blocks in enumerate(levels)]

    def stages(self, x: Tensor) -> list[Tensor]:
        x = checkpoint_seq(self.layer1, x) if self.grad_checkpointing else self.layer1(x)
        maps = [x]
        for transition, stage in ((self.transition1, self.stage2), (self.transition2, self.stage3), (self.transition3, self.stage4)):
            # identities stand for maps that exist already; the others start from the smallest map
            maps = stage([maps[i] if isinstance(t, nn.Identity) else t(maps[-1]) for i, t in enumerate(transition)])
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, _FusedBranches):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        with_previous = (99999,)  # timm's mark of what shares the group before it
        head = (r"^(?:incre_modules|downsamp_modules|final_layer)", with_previous)
        blocks = [(r"^layer(\d+)\.(\d+)", None), (r"^stage(\d+)\.(\d+)", None), (r"^transition(\d+)", with_previous), head]
        if coarse:
            blocks = [(r"^(?:layer|stage|transition)(\d+)", None), head]
        return dict(stem=r"^(?:conv|bn)[12]", blocks=blocks)

    def no_weight_decay(self) -> set[str]:
        return set()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Completes timm's weights of the same network without attention with the initial values of the attention in `model`.

    Also turns the names of the authors' layer, and of the backbone in their segmentation network, into ours. Raises ValueError for
    the latter where `model` fuses its maps otherwise.
    """
    if any(".deattn." in name for name in state_dict) and getattr(model, "fuse", None) != "bilinear":
        raise ValueError('weights of the authors\' segmentation network were trained with fuse="bilinear", got '
                         f"{getattr(model, 'fuse', None)!r}")
    renames = dict(
        deattn=_SLOT, conv_q_right="channel_query", conv_v_right="channel_value", conv_up="channel_up", conv_q_left="spatial_query",
        conv_v_left="spatial_value")
    state_dict = {".".join(renames.get(part, part) for part in name.split(".")): value for name, value in state_dict.items()}
    if any(f".{_SLOT}." in name for name in state_dict):
        return state_dict
    return state_dict | {name: value for name, value in model.state_dict().items() if f".{_SLOT}." in name}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bilinear",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="conv1", classifier="fc",
        paper_ids="arXiv:2107.00782", paper_name="Polarized Self-Attention: Towards High-quality Pixel-wise Regression", **kwargs,
    )


_HRNET = _cfg() | dict(classifier="classifier")

default_cfgs = generate_default_cfgs({
    "polarized_resnet_nano.untrained": _cfg() | dict(first_conv="conv1.0"),
    "polarized_resnet50_p.untrained": _cfg(),
    "polarized_resnet50_s.untrained": _cfg(),
    "polarized_hrnet_w18_p.untrained": _HRNET,
    "polarized_hrnet_w18_s.untrained": _HRNET,
    "polarized_hrnet_w48_p.untrained": _HRNET,
    "polarized_hrnet_w48_s.untrained": _HRNET,
})


_resnet = partial(build_model_with_cfg, PolarizedResNet, pretrained_filter_fn=checkpoint_filter_fn)


def _resnet50(variant: str, pretrained: bool, layout: Layout, **kwargs: Any) -> PolarizedResNet:
    args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3), layout=layout)
    return _resnet(variant, pretrained, **dict(args, **kwargs))


def _hrnet(variant: str, pretrained: bool, layout: Layout, **kwargs: Any) -> PolarizedHRNet:
    args: dict[str, Any] = dict(layout=layout)
    return build_model_with_cfg(
        PolarizedHRNet, variant, pretrained, model_cfg=cfg_cls[variant.removeprefix("polarized_")[:-2]],
        pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=dict(feature_cls="getter"), **dict(args, **kwargs),
    )


@register_model
def polarized_resnet_nano(pretrained: bool = False, **kwargs: Any) -> PolarizedResNet:
    """For small images and machines; not in the paper."""
    args: dict[str, Any] = dict(
        block=BasicBlock, layers=(1, 1, 2, 1), channels=(32, 64, 96, 128), stem_type="deep", stem_width=16, layout="sequential")
    return _resnet("polarized_resnet_nano", pretrained, **dict(args, **kwargs))


@register_model
def polarized_resnet50_p(pretrained: bool = False, **kwargs: Any) -> PolarizedResNet:
    return _resnet50("polarized_resnet50_p", pretrained, "parallel", **kwargs)


@register_model
def polarized_resnet50_s(pretrained: bool = False, **kwargs: Any) -> PolarizedResNet:
    return _resnet50("polarized_resnet50_s", pretrained, "sequential", **kwargs)


@register_model
def polarized_hrnet_w18_p(pretrained: bool = False, **kwargs: Any) -> PolarizedHRNet:
    return _hrnet("polarized_hrnet_w18_p", pretrained, "parallel", **kwargs)


@register_model
def polarized_hrnet_w18_s(pretrained: bool = False, **kwargs: Any) -> PolarizedHRNet:
    return _hrnet("polarized_hrnet_w18_s", pretrained, "sequential", **kwargs)


@register_model
def polarized_hrnet_w48_p(pretrained: bool = False, **kwargs: Any) -> PolarizedHRNet:
    return _hrnet("polarized_hrnet_w48_p", pretrained, "parallel", **kwargs)


@register_model
def polarized_hrnet_w48_s(pretrained: bool = False, **kwargs: Any) -> PolarizedHRNet:
    return _hrnet("polarized_hrnet_w48_s", pretrained, "sequential", **kwargs)
