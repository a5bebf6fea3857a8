"""SKNets (Selective Kernel Networks, arXiv 1903.06586): timm's ResNet and ResNeXt with an SK unit as the 3×3 convolution.

Two families. `sknet26/50/101` are the paper's: ResNeXt 32×4d, 3×3 and dilated 3×3 branches of 32 groups. Their weights were
released for Caffe only; timm's own training of the same network (`skresnext50_32x4d`) loads into `sknet50`:

    timm.create_model("sknet50", pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id="timm/skresnext50_32x4d.ra_in1k"))

Where sources disagree, the text of the paper is followed: the width of the reduction is max(C / 16, 32) everywhere (the
authors' Caffe file of SKNet-101 has 16 in the second stage). That gives 27.48 M parameters and 4.46 G multiply-adds for
SKNet-50, 48.74 M and 8.45 G for SKNet-101; the paper's table says 27.5 M, 4.47 G, 48.9 M and 8.46 G.

`sk_resnet50/101` are the authors' PyTorch variant: ResNet, a dense 3×3 and a 3×3 branch of 32 groups. Their
checkpoints (https://github.com/implus/PytorchInsight) load as they are:

    timm.create_model("sk_resnet50", pretrained=True, pretrained_cfg_overlay=dict(file="sk_resnet50.pth.tar"))
"""
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from zoo.layers import SelectiveKernelUnit
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.staged import Reinitialized

__all__ = ["SKBottleneck", "SKNet", "checkpoint_filter_fn"]

MECHANISM = "sk"
ATTACHABLE = SelectiveKernelUnit
REPORTED_IN = "the paper's table; of `sk_resnet` the authors' README"
REPORTED_TOP1 = {"sknet50": 79.21, "sknet101": 79.81, "sk_resnet50": 77.54, "sk_resnet101": 78.79}


class SKBottleneck(Bottleneck):
    """timm's bottleneck whose 3×3 convolution, with its norm and activation, is a `SelectiveKernelUnit`.

    Args: timm's, and `unit_args`, further arguments of the unit; its groups default to the convolution's.
    """

    def __init__(self, *args: Any, unit_args: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        conv = self.conv2
        options = {name: kwargs[name] for name in ("act_layer", "norm_layer", "device", "dtype") if name in kwargs}
        options |= dict(groups=conv.groups, stride=conv.stride[0], dilation=conv.dilation[0]) | (unit_args or {})
        self.conv2 = SelectiveKernelUnit(conv.in_channels, conv.out_channels, **options)
        self.bn2, self.act2 = nn.Identity(), nn.Identity()


class SKNet(Reinitialized, ResNet):
    """timm's ResNet of `SKBottleneck`s, any input size; arguments as there, `unit_args` by `block_args`."""

    def no_weight_decay(self) -> set[str]:
        return set()


_RENAMES = [
    (r"^module\.", ""),  # the authors' names → ours
    (r"(^|\.)conv2\.weight$", r"\1conv2.convs.0.weight"),
    (r"(^|\.)conv2g\.weight$", r"\1conv2.convs.1.weight"),
    (r"(^|\.)bn2\.", r"\1conv2.norms.0."),
    (r"(^|\.)bn2g\.", r"\1conv2.norms.1."),
    (r"(^|\.)conv_fc1\.", r"\1conv2.reduce."),
    (r"(^|\.)bn_fc1\.", r"\1conv2.norm."),
    (r"(^|\.)conv_fc2\.", r"\1conv2.select."),
    (r"\.conv([13])\.conv\.", r".conv\1."),  # timm's names → ours
    (r"\.conv([13])\.bn\.", r".bn\1."),
    (r"\.paths\.(\d+)\.conv\.", r".convs.\1."),
    (r"\.paths\.(\d+)\.bn\.", r".norms.\1."),
    (r"\.attn\.fc_reduce\.", ".reduce."),
    (r"\.attn\.bn\.", ".norm."),
    (r"\.attn\.fc_select\.", ".select."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The names of the authors' PyTorch variant, and of timm's `skresnext50_32x4d`, → ours, for a network and a single block."""
    return {renamed(name, _RENAMES): value for name, value in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bilinear",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="conv1", classifier="fc",
        paper_ids="arXiv:1903.06586", paper_name="Selective Kernel Networks", **kwargs,
    )


_PYTORCH = dict(origin_url="https://github.com/implus/PytorchInsight")

default_cfgs = generate_default_cfgs({
    "sknet_nano.untrained": _cfg() | dict(first_conv="conv1.0"),
    "sknet26.untrained": _cfg(),
    "sknet50.untrained": _cfg(),
    "sknet101.untrained": _cfg(),
    "sk_resnet50.in1k": _cfg(**_PYTORCH),
    "sk_resnet101.in1k": _cfg(**_PYTORCH),
})


def _sknet(variant: str, pretrained: bool, **kwargs: Any) -> SKNet:
    return build_model_with_cfg(
        SKNet, variant, pretrained, block=SKBottleneck, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


_RESNEXT = dict(cardinality=32, base_width=4)
# Unlike timm, the authors let the last norm of a residual branch begin with factors of 1.
_RESNET = dict(zero_init_last=False, block_args=dict(unit_args=dict(kernel_sizes=(3, 3), groups=(1, 32), min_width=1)))


@register_model
def sknet_nano(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """For small images and machines; not in the paper."""
    args = dict(
        layers=(1, 1, 2, 1), channels=(16, 32, 64, 96), stem_type="deep", stem_width=16, cardinality=8, base_width=8,
        block_args=dict(unit_args=dict(min_width=16)))
    return _sknet("sknet_nano", pretrained, **dict(args, **kwargs))


@register_model
def sknet26(pretrained: bool = False, **kwargs: Any) -> SKNet:
    return _sknet("sknet26", pretrained, **dict(_RESNEXT | dict(layers=(2, 2, 2, 2)), **kwargs))


@register_model
def sknet50(pretrained: bool = False, **kwargs: Any) -> SKNet:
    return _sknet("sknet50", pretrained, **dict(_RESNEXT | dict(layers=(3, 4, 6, 3)), **kwargs))


@register_model
def sknet101(pretrained: bool = False, **kwargs: Any) -> SKNet:
    return _sknet("sknet101", pretrained, **dict(_RESNEXT | dict(layers=(3, 4, 23, 3)), **kwargs))


@register_model
def sk_resnet50(pretrained: bool = False, **kwargs: Any) -> SKNet:
    return _sknet("sk_resnet50", pretrained, **dict(_RESNET | dict(layers=(3, 4, 6, 3)), **kwargs))


@register_model
def sk_resnet101(pretrained: bool = False, **kwargs: Any) -> SKNet:
    return _sknet("sk_resnet101", pretrained, **dict(_RESNET | dict(layers=(3, 4, 23, 3)), **kwargs))
