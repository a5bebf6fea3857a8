"""U-Nets with attention gates (Attention U-Net, arXiv 1804.03999) in 2-D and 3-D, and around any hierarchical timm model.

The authors' network for CT is `attention_unet3d`; its checkpoints (MIT licence; class unet_CT_multi_att_dsv_3D of
https://github.com/ozan-oktay/Attention-Gated-Networks) load as they are:

    timm.create_model("attention_unet3d", pretrained=True, pretrained_cfg_overlay=dict(file="unet_ct.pth"))
"""
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import create_act_layer, get_act_layer, get_device_dtype, register_notrace_function
from timm.models import FeatureInfo, checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.errors import InputError, near_misses
from zoo.kernels._backends import in_functorch
from zoo.kernels._exporting import is_exporting
from zoo.layers import AttentionGate, MultiAttentionGate
from zoo.layers._initialization import fan_in_normal_
from zoo.layers._scripting import refuse_scripting
from zoo.layers._spatial import CHANNELS_LAST, CONV, MAX_POOL, SIZES, Norm, check_spatial, crop, norm_layer, pad_to_multiple, resize
from zoo.models.building import build_model_with_cfg, names_weights
from zoo.models.conversion import renamed
from zoo.models.staged import reset_parameters
from zoo.weights import load_weights

__all__ = ["UNet", "checkpoint_filter_fn"]

MECHANISM = "gates"
DENSE = True
StateDict = dict[str, Tensor]
NARROWEST = 16  # decoder widths that an encoder implies are halved down to this


class Blocks:
    """Makes the parts of a network that are alike: all of one dimension, norm and activation."""

    norm: Norm

    def __init__(self, spatial_dims: int, norm: Norm, act_layer: str, **dd: Any):
        check_spatial(spatial_dims, norm)
        try:
            get_act_layer(act_layer)
        except KeyError:
            raise ValueError(f"act_layer must be one of timm's, such as relu, leaky_relu, gelu or silu, got {act_layer!r}") from None
        self.spatial_dims, self.norm, self.act_layer, self.dd = spatial_dims, norm, act_layer, dd

    def conv(self, dim: int, out_dim: int, kernel_size: int, suffix: str = "") -> dict[str, nn.Module]:
        """Convolution, norm and activation."""
        conv = CONV[self.spatial_dims](dim, out_dim, kernel_size, padding=kernel_size // 2, **self.dd)
        norm = norm_layer(self.norm, self.spatial_dims, out_dim, **self.dd)
        act = cast(nn.Module, create_act_layer(self.act_layer, inplace=True))  # None only for no name
        return {f"conv{suffix}": conv, f"norm{suffix}": norm, f"act{suffix}": act}

    def double_conv(self, dim: int, out_dim: int) -> nn.Sequential:
        return Convolutions(**self.conv(dim, out_dim, 3, "1"), **self.conv(out_dim, out_dim, 3, "2"))

    def gate(self, dim: int, gate_dim: int, num_gates: int) -> nn.Module:
        args: dict[str, Any] = dict(spatial_dims=self.spatial_dims, norm=self.norm, **self.dd)
        return AttentionGate(dim, gate_dim, **args) if num_gates == 1 else MultiAttentionGate(dim, gate_dim, num_gates=num_gates, **args)


class Convolutions(nn.Sequential):
    """A sequence whose modules have names, with first values of the authors' rule."""

    def __init__(self, **modules: nn.Module):
        super().__init__(OrderedDict(modules))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_in_normal_(self)


class ConvEncoder(nn.Module):
    """Two convolutions at every level, max pooling between levels; (B, C, …) → the maps of all levels, finest first."""

    channels: list[int]
    reductions: list[int]

    def __init__(self, in_chans: int, widths: Sequence[int], blocks: Blocks):
        super().__init__()
        self.channels, self.reductions = list(widths), [2**i for i in range(len(widths))]
        self.pool = MAX_POOL[blocks.spatial_dims](2)
        self.levels = nn.ModuleList(blocks.double_conv(dim, out) for dim, out in zip([in_chans, *widths], widths, strict=False))
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = channels_last(x), []
        for level in self.levels:
            x = self.pool(maps[-1]) if maps else x
            maps.append(checkpoint(level, x) if self.grad_checkpointing else level(x))
        return maps

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.grad_checkpointing = enable


@register_notrace_function
def channels_last(x: Tensor) -> Tensor:
    """x, on the CPU with channels last in memory, where convolutions are up to twice as fast."""
    if x.device.type != "cpu" or is_exporting() or in_functorch():
        return x
    return x.clone(memory_format=CHANNELS_LAST[x.ndim - 2])  # a copy, since `contiguous` leaves one channel as it is


class TimmEncoder(nn.Module):
    """A timm model's feature maps, as (B, C, H, W), finest first."""

    channels: list[int]
    reductions: list[int]

    def __init__(self, name: str, in_chans: int, **args: Any):
        super().__init__()
        if not timm.is_model(name):
            raise InputError(f"encoder must be a model that timm knows, got {name!r}{near_misses(name, timm.list_models())}")
        try:
            self._create = partial(timm.create_model, name, in_chans=in_chans, **args)
            self.model = self._make()
        except (RuntimeError, AttributeError, NotImplementedError) as error:  # models without feature maps, each in its way
            raise InputError(f"encoder {name} cannot give feature maps: {error}") from error
        info = cast(FeatureInfo, self.model.feature_info)
        self.channels, self.reductions = info.channels(), info.reduction()
        if any(fine >= coarse for fine, coarse in zip(self.reductions, self.reductions[1:], strict=False)):
            raise InputError(f"encoder {name} is not hierarchical: its maps are the input's size divided by {self.reductions}")

    def _make(self, **more: Any) -> nn.Module:
        return self._create(features_only=True, **more)

    def load_weights(self, file: str) -> None:
        """Takes the weights of a classifier of the encoder's name in a file, as `zoo.weights.load_weights` reads it."""
        whole = self._create()
        load_weights(whole, file, new_head=True)
        self.model.load_state_dict(self._make(pretrained=True, pretrained_cfg_overlay={"state_dict": whole.state_dict()}).state_dict())

    def reset_parameters(self) -> None:
        """Values of a new encoder; timm's models without head have no method for that."""
        new = self._make(**get_device_dtype(self.model))
        with torch.no_grad():
            for old, value in zip(_tensors(self.model), _tensors(new), strict=True):
                old.copy_(value)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.model(x)
        return [x.permute(0, 3, 1, 2) for x in maps] if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else maps

    def set_grad_checkpointing(self, enable: bool) -> None:
        network = self.model if hasattr(self.model, "set_grad_checkpointing") else self.model.model  # timm wraps some
        cast(Any, network).set_grad_checkpointing(enable)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class Up(nn.Module):
    """One level of the decoder: two convolutions of the skip, gated or not, beside the coarser map, interpolated to its size.

    Without skip (`skip_dim` 0) the map's size is doubled. A light level has one convolution, and narrows the coarser map by a
    1×1 convolution before.
    """

    def __init__(self, dim: int, skip_dim: int, out_dim: int, num_gates: int, light: bool, blocks: Blocks):
        super().__init__()
        self.gate = blocks.gate(skip_dim, dim, num_gates) if num_gates else None
        self.narrow = Convolutions(**blocks.conv(dim, out_dim, 1)) if light else nn.Identity()
        self.conv = Convolutions(**blocks.conv(skip_dim + out_dim, out_dim, 3)) if light else blocks.double_conv(skip_dim + dim, out_dim)

    def forward(self, x: Tensor, skip: Tensor | None, signal: Tensor) -> Tensor:
        x = self.narrow(x)
        if skip is None:
            return self.conv(resize(x, 2))
        gated = skip if self.gate is None else self.gate(skip, signal)
        return self.conv(torch.cat([gated, resize(x, skip.shape[2:])], 1))


class Head(nn.Module):
    """Logits at the finest map's size: of that map alone, or a 1×1 mixture of the logits of several levels; finest first."""

    def __init__(self, dims: Sequence[int], num_classes: int, spatial_dims: int, **dd: Any):
        super().__init__()
        conv = CONV[spatial_dims]
        self.levels = nn.ModuleList(conv(dim, num_classes, 1, **dd) for dim in dims)
        self.fuse = conv(len(dims) * num_classes, num_classes, 1, **dd) if len(dims) > 1 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_in_normal_((*self.levels, self.fuse))

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        return self.fuse(torch.cat([resize(level(x), size) for level, x in zip(self.levels, maps, strict=True)], 1))


class UNet(nn.Module):
    """U-Net with attention gates on its skip connections (arXiv 1804.03999), or without.

    (B, in_chans, H, W) → (B, num_classes, H, W), in 3-D (B, in_chans, D, H, W) → (B, num_classes, D, H, W), logits, any sizes:
    inside, the last slices are repeated up to sizes that divide. Skips at the full resolution have no gates, as in the paper;
    the coarsest map gates its skip through a 1×1 convolution, every other through the decoder's map.

    Args:
        in_chans, num_classes, device, dtype: as in timm; 0 classes leave out the head: the output is the finest map.
        widths: of the levels, finest first; default 64, 128, 256, 512, 1024. With an encoder, of the decoder's levels from the
            full resolution down; default: the encoder's, halved towards the full resolution down to 16.
        encoder: name of a hierarchical timm model that takes the place of the convolutions on the way down; 2-D only.
        encoder_args: arguments of `timm.create_model` for it, such as `pretrained` or `drop_path_rate`.
        num_gates: per skip; 0 for a plain U-Net.
        light_decoder: the decoder narrows the coarser map by a 1×1 convolution before it is interpolated, and has one convolution
            per level instead of two: about half of the multiplications. Not in the paper.
        deep_supervision: every level predicts, and the output is a 1×1 mixture of their interpolated logits.
        norm: "batch", "instance", or "group" (8 channels each), outside the encoder.
        act_layer: timm's name of the activation outside the encoder.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: arguments outside what is said above, at construction; an input of another shape, in `forward`.
    """

    __prepare_scriptable__ = refuse_scripting
    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 2,
        widths: Sequence[int] | None = None,
        encoder: str | None = None,
        encoder_args: Mapping[str, Any] | None = None,
        num_gates: int = 1,
        light_decoder: bool = False,
        deep_supervision: bool = False,
        norm: Norm = "batch",
        act_layer: str = "relu",
        spatial_dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes, self.deep_supervision, self.spatial_dims = in_chans, num_classes, deep_supervision, spatial_dims
        blocks = Blocks(spatial_dims, norm, act_layer, **dd)
        if encoder is None:
            if encoder_args:
                raise ValueError(f"encoder_args are for an encoder, and none is given, got {dict(encoder_args)}")
            widths = (64, 128, 256, 512, 1024) if widths is None else widths
            if len(widths) < 2:
                raise ValueError(f"widths must have at least two levels, got {tuple(widths)}")
            self.encoder = ConvEncoder(in_chans, widths, blocks)
            widths = widths[:-1]
        else:
            if spatial_dims != 2:
                raise ValueError(f"encoder must be None in 3-D, as timm's models are 2-D, got {encoder!r}")
            self.encoder = TimmEncoder(encoder, in_chans, **{**dd, **(encoder_args or {})})
        channels, reductions = self.encoder.channels, self.encoder.reductions
        self.reduction = reductions[-1]

        without_skip = reductions[0].bit_length() - 1
        skip_dims = [0] * without_skip + channels[:-1]
        if widths is None:
            widths = [max(NARROWEST, channels[0] >> (without_skip - i)) for i in range(without_skip)] + channels[:-1]
        if len(widths) != len(skip_dims):
            raise ValueError(f"widths must be of the decoder's {len(skip_dims)} levels with the encoder {encoder}, got {tuple(widths)}")

        dim = channels[-1]
        self.signal = Convolutions(**blocks.conv(dim, dim, 1)) if num_gates else nn.Identity()
        self.decoder = nn.ModuleList()
        for i in reversed(range(len(widths))):
            gates = num_gates if i and skip_dims[i] else 0
            self.decoder.append(Up(dim, skip_dims[i], widths[i], gates, light_decoder, blocks))
            dim = widths[i]
        self.num_features = self.head_hidden_size = dim
        self.widths = list(widths)
        self.grad_checkpointing = False
        self.reset_classifier(num_classes)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Values of a new network, as in timm. Nothing is left for it where modules have just been made."""
        if needs_reset:
            reset_parameters(self)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        dims = self.widths if self.deep_supervision else self.widths[:1]
        self.head = Head(dims, num_classes, self.spatial_dims, **get_device_dtype(self)) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        encoder = r"^encoder\.levels\.(\d+)" if isinstance(self.encoder, ConvEncoder) else r"^encoder"
        return dict(encoder=encoder, signal=r"^signal", decoder=r"^decoder\.(\d+)")

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The decoder's maps, finest first: of all levels under deep supervision, else of the finest alone."""
        *skips, x = self.encoder(x)
        skips = [None] * (len(self.decoder) - len(skips)) + skips
        signal, maps = self.signal(x), []
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            x = signal = checkpoint(up, x, skip, signal) if self.grad_checkpointing else up(x, skip, signal)
            maps = [x, *maps] if self.deep_supervision else [x]
        return maps

    def forward_head(self, maps: list[Tensor], pre_logits: bool = False) -> Tensor:
        return maps[0] if pre_logits or not self.num_classes else self.head(maps)

    def forward(self, x: Tensor) -> Tensor:
        x = checked(x, self.in_chans, self.spatial_dims)
        maps = self.forward_features(pad_to_multiple(x, self.reduction, "replicate"))
        return crop(self.forward_head(maps), x.shape[2:], by_index=True)


@register_notrace_function
def checked(x: Tensor, in_chans: int, spatial_dims: int) -> Tensor:
    """x, unless it is of another shape."""
    if x.ndim != 2 + spatial_dims or x.shape[1] != in_chans:
        raise ValueError(f"UNet: x must be (B, {in_chans}, {SIZES[spatial_dims]}) in {spatial_dims}-D, got shape {tuple(x.shape)}")
    return x


_RENAMES = [  # the authors' names → ours; levels are counted from 1, the decoder's from the coarsest
    (r"^conv(\d)\.", lambda m: f"encoder.levels.{int(m[1]) - 1}."),
    (r"^center\.", "encoder.levels.4."),
    (r"^attentionblock(\d)\.", lambda m: f"decoder.{4 - int(m[1])}.gate."),
    (r"^up_concat(\d)\.", lambda m: f"decoder.{4 - int(m[1])}."),
    (r"^gating\.conv1\.0\.", "signal.conv."),
    (r"^gating\.conv1\.1\.", "signal.norm."),
    (r"\.conv([12])\.0\.", r".conv\1."),
    (r"\.conv([12])\.1\.", r".norm\1."),
    (r"\.gate_block_(\d)\.", lambda m: f".gates.{int(m[1]) - 1}."),
    (r"\.combine_gates\.0\.", ".combine."),
    (r"\.combine_gates\.1\.", ".norm."),
    (r"(^|\.)W\.0\.", r"\1proj."),
    (r"(^|\.)W\.1\.", r"\1norm."),
    (r"^dsv(\d)\.(?:dsv\.0\.)?", lambda m: f"head.levels.{int(m[1]) - 1}."),
    (r"^final\.", "head.fuse."),
]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours, for their network for CT and for a single gate."""
    if any(name.startswith("encoder.") for name in state_dict):  # ours
        return state_dict
    return {renamed(name, _RENAMES): value for name, value in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    cfg = dict(
        num_classes=2, input_size=(3, 256, 256), first_conv="encoder.levels.0.conv1", classifier="head.levels.0", license="mit",
        paper_ids="arXiv:1804.03999", paper_name="Attention U-Net: Learning Where to Look for the Pancreas")
    return cfg | kwargs


def _cfg_3d(**kwargs: Any) -> dict[str, Any]:
    """Cubes; timm's field for the size of an input holds two of their sides."""
    classifier = (*(f"head.levels.{i}" for i in range(4)), "head.fuse")
    return _cfg(input_size=(1, 64, 64), num_classes=4, mean=(0.0,), std=(1.0,), crop_pct=1.0, classifier=classifier,
                origin_url="https://github.com/ozan-oktay/Attention-Gated-Networks", **kwargs)


def _is_encoder(name: str) -> bool:
    """Whether a model is a hierarchical network of the zoo; its families are imported before this module."""
    family = sys.modules[timm.model_entrypoint(name).__module__]
    return family.__name__.startswith(f"{__package__}.") and getattr(family, "HIERARCHICAL", True)


ENCODERS = {f"attention_unet_{name}": name for name in timm.list_models() if _is_encoder(name)}  # by the names of U-Nets around them

default_cfgs = generate_default_cfgs({
    "attention_unet.untrained": _cfg(),
    "attention_unet_nano.untrained": _cfg(),
    "attention_unet3d.untrained": _cfg_3d(),
    "attention_unet3d_light.untrained": _cfg_3d(),
    "attention_unet3d_nano.untrained": _cfg_3d(),
    "unet.untrained": _cfg(paper_ids="arXiv:1505.04597", paper_name="U-Net: Convolutional Networks for Biomedical Image Segmentation"),
    "unet3d.untrained": _cfg_3d(),
    **{f"{name}.untrained": _cfg(first_conv=None) for name in ENCODERS},
})
PLAIN = ["unet", "unet3d"]  # without gates


def _unet(variant: str, pretrained: bool, **kwargs: Any) -> UNet:
    """`pretrained` is about the encoder, where there is one and no file of weights for the whole network is named."""
    if kwargs.get("features_only"):
        raise RuntimeError(f"features_only is not implemented for {variant}: U-Nets give maps of the input's size")
    if kwargs.get("encoder") and pretrained and not names_weights(kwargs):
        pretrained, kwargs["encoder_args"] = False, dict(kwargs.get("encoder_args") or {}, pretrained=True)
    model = build_model_with_cfg(UNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
    if model.spatial_dims == 3:
        channels, *sides = model.pretrained_cfg["input_size"]
        model.pretrained_cfg["input_size"] = (channels, sides[0], *sides)
    return model


@register_model
def attention_unet(pretrained: bool = False, **kwargs: Any) -> UNet:
    """One gate per skip; `encoder="convnext_nano"` puts any hierarchical timm model in the place of the way down."""
    return _unet("attention_unet", pretrained, **kwargs)


@register_model
def attention_unet_nano(pretrained: bool = False, **kwargs: Any) -> UNet:
    """For small images and machines; not in the paper."""
    return _unet("attention_unet_nano", pretrained, **dict(dict(widths=(8, 16, 32, 64)), **kwargs))


_CT = dict(widths=(16, 32, 64, 128, 256), num_gates=2, deep_supervision=True, spatial_dims=3)


@register_model
def attention_unet3d(pretrained: bool = False, **kwargs: Any) -> UNet:
    """The paper's network for CT: two gates per skip, deep supervision, a quarter of U-Net's widths."""
    return _unet("attention_unet3d", pretrained, **dict(_CT, **kwargs))


@register_model
def attention_unet3d_light(pretrained: bool = False, **kwargs: Any) -> UNet:
    """Of the same widths, with one gate per skip and a light decoder, without deep supervision; not in the paper."""
    args = dict(_CT, num_gates=1, deep_supervision=False, light_decoder=True)
    return _unet("attention_unet3d_light", pretrained, **dict(args, **kwargs))


@register_model
def attention_unet3d_nano(pretrained: bool = False, **kwargs: Any) -> UNet:
    """For small volumes and machines; not in the paper."""
    return _unet("attention_unet3d_nano", pretrained, **dict(dict(_CT, widths=(8, 16, 32)), **kwargs))


@register_model
def unet(pretrained: bool = False, **kwargs: Any) -> UNet:
    """`attention_unet` without gates."""
    return _unet("unet", pretrained, **dict(dict(num_gates=0), **kwargs))


@register_model
def unet3d(pretrained: bool = False, **kwargs: Any) -> UNet:
    """`attention_unet3d` without gates."""
    return _unet("unet3d", pretrained, **dict(dict(_CT, num_gates=0), **kwargs))


def _register_with_encoder(variant: str, encoder: str) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> UNet:
        return _unet(variant, pretrained, **dict(dict(encoder=encoder), **kwargs))

    build.__name__, build.__doc__ = variant, f"`attention_unet` around `{encoder}`."
    setattr(sys.modules[__name__], variant, register_model(build))


for _variant, _encoder in ENCODERS.items():
    _register_with_encoder(_variant, _encoder)
