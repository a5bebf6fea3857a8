"""ResNets and a MobileNetV2 with deformable attention gates (DAS, arXiv 2311.12091).

Reported on ImageNet-1k at 224: +1.91 points of top-1 over ResNet-50. There is no code and there are no weights by the authors
(docs/cards/das.md). The gate stands after the residual sum (and the ReLU that follows it) of the last block of each stage,
which is the cheaper reading of "in every stage"; `gates="block"` puts one after every block. See `zoo.layers.DAS` for the
gate itself.
The paper's table of parameters and multiply-adds was not at hand: those of the tests are ours, not checked against it.

timm's own weights load into everything but the gates, which keep their initialisation:

    timm.create_model("das_resnet50", pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id="timm/resnet50.a1_in1k"))
"""
from typing import Any, Literal, cast, get_args

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import (  # private, and the only source of it: timm's own families use it
    decode_arch_def,
    efficientnet_init_weights,
)
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from zoo.layers import DAS
from zoo.models.building import build_model_with_cfg
from zoo.models.staged import Reinitialized

__all__ = ["DASMobileNet", "DASResNet", "GatedBlock", "checkpoint_filter_fn"]

MECHANISM = "das"
ATTACHABLE = DAS
Gates = Literal["stage", "block"]


class GatedBlock(nn.Module):
    """A residual block of timm's and the gate of its output."""

    def __init__(self, block: nn.Module, das: DAS):
        super().__init__()
        self.block, self.das = block, das

    def forward(self, x: Tensor) -> Tensor:
        return self.das(self.block(x))


def _add_gates(model: ResNet | EfficientNet, stages: list[str], gates: Gates, das_args: dict[str, Any] | None) -> None:
    if gates not in get_args(Gates):
        raise ValueError(f"gates must be one of {', '.join(get_args(Gates))}, got {gates!r}")
    ends = [info["module"] for info in model.feature_info]
    for name in stages:
        stage = cast(nn.Sequential, model.get_submodule(name))
        for i, block in enumerate(stage):
            if gates == "block" or name in ends and i == len(stage) - 1:
                norm = cast(Any, block.bn3 if hasattr(block, "bn3") else block.bn2)
                stage[i] = GatedBlock(block, DAS(norm.num_features, **{**get_device_dtype(block), **(das_args or {})}))


class DASResNet(Reinitialized, ResNet):
    """timm's ResNet with gates.

    Args:
        gates: "stage": after the last block of each stage; "block": after every block.
        das_args: further arguments of `DAS`.
        kwargs: those of timm's ResNet.
    """

    added = DAS

    def __init__(self, *args: Any, gates: Gates = "stage", das_args: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _add_gates(self, [f"layer{i}" for i in (1, 2, 3, 4)], gates, das_args)

    def no_weight_decay(self) -> set[str]:
        return set()


class _MobileNet(EfficientNet):
    """timm's EfficientNet, whose initialisation is a function, with a method for it."""

    def init_weights(self) -> None:
        efficientnet_init_weights(self)


class DASMobileNet(Reinitialized, _MobileNet):
    """timm's EfficientNet, of which MobileNetV2 is one, with gates.

    Args:
        gates: "stage": after the last block of each resolution, five times; "block": after every block.
        das_args: further arguments of `DAS`.
        kwargs: those of timm's EfficientNet.
    """

    added = DAS
    _as_made: dict[str, Any] = {}  # timm's constructor calls the function itself

    def __init__(self, *args: Any, gates: Gates = "stage", das_args: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _add_gates(self, [f"blocks.{i}" for i in range(len(self.blocks))], gates, das_args)

    def no_weight_decay(self) -> set[str]:
        return set()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's names → ours; the gates of a network that has none are those that `model` was made with."""
    own, gated = model.state_dict(), [name for name, module in model.named_modules() if isinstance(module, GatedBlock)]
    converted = {}
    for name, value in state_dict.items():
        for block in gated:
            if name.startswith(f"{block}.") and name not in own:
                name = f"{block}.block.{name.removeprefix(f'{block}.')}"
        converted[name] = value
    if not any(".das." in name for name in converted):
        converted |= {name: value for name, value in own.items() if ".das." in name}
    return converted


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, paper_ids="arXiv:2311.12091",
        paper_name="DAS: A Deformable Attention to Capture Salient Information in CNNs",
        **dict(dict(first_conv="conv1", classifier="fc"), **kwargs),
    )


default_cfgs = generate_default_cfgs({
    "das_resnet_nano.untrained": _cfg(),
    "das_resnet18.untrained": _cfg(),
    "das_resnet34.untrained": _cfg(),
    "das_resnet50.untrained": _cfg(),
    "das_resnet101.untrained": _cfg(),
    "das_mobilenetv2_100.untrained": _cfg(first_conv="conv_stem", classifier="classifier"),
})


def _das_resnet(variant: str, pretrained: bool, **kwargs: Any) -> DASResNet:
    return build_model_with_cfg(DASResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def das_resnet_nano(pretrained: bool = False, **kwargs: Any) -> DASResNet:
    """For small images and machines; not in the paper."""
    args = dict(block=BasicBlock, layers=(1, 1, 1, 1), channels=(32, 64, 96, 128))
    return _das_resnet("das_resnet_nano", pretrained, **dict(args, **kwargs))


@register_model
def das_resnet18(pretrained: bool = False, **kwargs: Any) -> DASResNet:
    return _das_resnet("das_resnet18", pretrained, **dict(dict(block=BasicBlock, layers=(2, 2, 2, 2)), **kwargs))


@register_model
def das_resnet34(pretrained: bool = False, **kwargs: Any) -> DASResNet:
    return _das_resnet("das_resnet34", pretrained, **dict(dict(block=BasicBlock, layers=(3, 4, 6, 3)), **kwargs))


@register_model
def das_resnet50(pretrained: bool = False, **kwargs: Any) -> DASResNet:
    return _das_resnet("das_resnet50", pretrained, **dict(dict(block=Bottleneck, layers=(3, 4, 6, 3)), **kwargs))


@register_model
def das_resnet101(pretrained: bool = False, **kwargs: Any) -> DASResNet:
    return _das_resnet("das_resnet101", pretrained, **dict(dict(block=Bottleneck, layers=(3, 4, 23, 3)), **kwargs))


@register_model
def das_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> DASMobileNet:
    stages = ["ds_r1_k3_s1_c16", "ir_r2_k3_s2_e6_c24", "ir_r3_k3_s2_e6_c32", "ir_r4_k3_s2_e6_c64", "ir_r3_k3_s1_e6_c96",
              "ir_r3_k3_s2_e6_c160", "ir_r1_k3_s1_e6_c320"]  # repeats, kernel, stride, expansion, channels
    args = dict(block_args=decode_arch_def([[stage] for stage in stages]), act_layer=nn.ReLU6)
    return build_model_with_cfg(
        DASMobileNet, "das_mobilenetv2_100", pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True), **dict(args, **kwargs),
    )
