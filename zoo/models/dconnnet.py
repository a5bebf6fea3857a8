"""DconnNet (arXiv 2304.00145): connections of neighbouring pixels, decoded from any hierarchical timm model with a directional prior.

The authors' network is `dconnnet`; their checkpoints (https://github.com/Zyun-Y/DconnNet, model/DconnNet.py; no licence is stated) load as
they are, those of binary tasks into a network of two classes:

    timm.create_model("dconnnet", pretrained=True, pretrained_cfg_overlay=dict(file="dconnnet.pth"))
"""
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype, register_notrace_function
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.layers._capture import report
from zoo.layers._scripting import refuse_scripting
from zoo.layers._spatial import crop, pad_to_multiple
from zoo.layers._tracing import notrace_module
from zoo.layers.connectivity import NEIGHBOURS, class_logits, map_channels
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.encoders import TimmEncoder, pretrained_encoder
from zoo.models.staged import named, reset_parameters
from zoo.models.unet import checked

__all__ = ["DconnNet", "checkpoint_filter_fn"]

MECHANISM = "connectivity"
DENSE = True
StateDict = dict[str, Tensor]
WIDE_PRIOR = 32  # channels from which on a prior is not widened any more before it is encoded, as in the authors' code


@register_notrace_function
def interpolate(x: Tensor, to: Sequence[int] | int) -> Tensor:
    """Bilinearly between the corners (align_corners=True), as the authors do everywhere, to a size or by a factor."""
    size = [n * to for n in x.shape[2:]] if isinstance(to, int) else to
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def conv_norm(dim: int, out_dim: int, kernel_size: int, bias: bool = False, **dd: Any) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    conv = nn.Conv2d(dim, out_dim, kernel_size, padding=kernel_size // 2, bias=bias, **dd)
    return named(conv=conv, norm=nn.BatchNorm2d(out_dim, **dd), act=nn.ReLU())


class PositionAttention(nn.Module):
    """γ · attention of all positions to all + x (DANet, arXiv 1809.02983); (B, dim, H, W), queries and keys of an eighth of the width."""

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(dim, out, 1, **dd) for out in (max(1, dim // 8), max(1, dim // 8), dim))
        self.gamma = nn.Parameter(torch.empty(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).flatten(2) for proj in (self.query, self.key, self.value))
        attention = (q.mT @ k).softmax(-1)
        return self.gamma * (v @ attention.mT).unflatten(2, x.shape[2:]) + x


class ChannelAttention(nn.Module):
    """γ · softmax(-X Xᵀ) X + X, X the positions of every channel (DANet, arXiv 1809.02983); (B, dim, H, W)."""

    def __init__(self, **dd: Any):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2)
        attention = (-(positions @ positions.mT)).softmax(-1)
        return self.gamma * (attention @ positions).unflatten(2, x.shape[2:]) + x


class DirectionHead(nn.Module):
    """Position and channel attention of one direction's slice of the coarsest map, scaled by its slice of the prior; (B, dim, H, W)."""

    def __init__(self, dim: int, drop_rate: float, **dd: Any):
        super().__init__()
        self.position_in, self.channel_in = (conv_norm(dim, dim, 3, **dd) for _ in range(2))
        self.position, self.channel = PositionAttention(dim, **dd), ChannelAttention(**dd)
        self.position_out, self.channel_out = (conv_norm(dim, dim, 3, **dd) for _ in range(2))
        self.drop, self.proj = nn.Dropout2d(drop_rate), nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        positions = self.position_out(self.position(self.position_in(x)))
        channels = self.channel_out(self.channel(self.channel_in(x)))
        return self.proj(self.drop((positions + channels) * scale.sigmoid()))


@notrace_module
class DirectionalExcitation(nn.Module):
    """x + the heads of its 8 slices of channels, as the prior excites them (section 3.2); x (B, dim, H, W), prior (B, prior_dim, 1, 1)."""

    def __init__(self, dim: int, prior_dim: int, drop_rate: float = 0.1, **dd: Any):
        super().__init__()
        self.heads = nn.ModuleList(DirectionHead(dim // NEIGHBOURS, drop_rate, **dd) for _ in range(NEIGHBOURS))
        self.drop, self.proj = nn.Dropout2d(drop_rate), nn.Conv2d(dim, dim, 1, **dd)
        self.reset_prior(prior_dim, **dd)

    def reset_prior(self, prior_dim: int, **dd: Any) -> None:
        dim = self.proj.in_channels
        hidden = prior_dim * NEIGHBOURS if prior_dim < WIDE_PRIOR else dim
        self.encode = named(conv1=nn.Conv2d(prior_dim, hidden, 1, **dd), act=nn.ReLU(), conv2=nn.Conv2d(hidden, dim, 1, **dd))

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        pieces, scales = x.chunk(NEIGHBOURS, 1), self.encode(prior).chunk(NEIGHBOURS, 1)
        return x + self.proj(self.drop(torch.cat([head(pieces[i], scales[i]) for i, head in enumerate(self.heads)], 1)))


@notrace_module
class SpaceBlock(nn.Module):
    """σ(Σ_c scene · content(x)) · value(x), where a scene of the coarser level matters (section 3.3).

    scene (B, scene_dim, 1, 1) and x (B, dim, H, W) → (B, out_dim, H, W). `zoo.capture` gets `attention`: the sigmoid, (B, 1, H, W).
    """

    def __init__(self, scene_dim: int, dim: int, out_dim: int, **dd: Any):
        super().__init__()
        self.scene = named(conv1=nn.Conv2d(scene_dim, out_dim, 1, **dd), act=nn.ReLU(), conv2=nn.Conv2d(out_dim, out_dim, 1, **dd))
        self.content, self.value = (conv_norm(dim, out_dim, 1, bias=True, **dd) for _ in range(2))

    def forward(self, scene: Tensor, x: Tensor) -> Tensor:
        attention = (self.scene(scene) * self.content(x)).sum(1, keepdim=True).sigmoid()
        report(self, attention=attention)
        return attention * self.value(x)


class FeatureBlock(nn.Module):
    """A 3×3 convolution, or none where `spread` is false, interpolation, by default to twice the size, and a 1×1 convolution."""

    def __init__(self, dim: int, out_dim: int, spread: bool = True, **dd: Any):
        super().__init__()
        self.spread = conv_norm(dim, dim, 3, **dd) if spread else nn.Identity()
        self.narrow = conv_norm(dim, out_dim, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor, to: Sequence[int] | int = 2) -> Tensor:
        return self.narrow(interpolate(self.spread(x), to))


class LightDecoder(nn.Module):
    """The mean of maps, finest first, each brought to the finest's size level by level, with a convolution at each; (B, out_dim, H, W)."""

    def __init__(self, dims: Sequence[int], out_dim: int, **dd: Any):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(conv_norm(out_dim if step else dim, out_dim, 3, **dd) for step in range(max(1, level)))
            for level, dim in enumerate(dims))

    def forward(self, *maps: Tensor) -> Tensor:
        brought = []
        for level, (convs, x) in enumerate(zip(self.levels, maps, strict=True)):
            for step, conv in enumerate(cast(nn.ModuleList, convs)):
                x = conv(x)
                x = interpolate(x, maps[level - step - 1].shape[2:]) if level else x
            brought.append(x)
        return sum(brought[1:], brought[0]) / len(brought)


class DconnNet(nn.Module):
    """Connections of pixels from any hierarchical timm model (arXiv 2304.00145), and classes of pixels by bilateral voting.

    In evaluation mode (B, in_chans, H, W) → (B, num_classes, H, W), logits as `zoo.layers.connectivity.class_logits` makes them of
    connections. In training mode a pair for `zoo.ConnectivityLoss`: the connections (B, 8 num_classes, H, W), with two classes, a
    background and a thing, (B, 8, H, W), and the prior's, alike. Any sizes: inside, the last rows and columns are repeated up
    to sizes that divide.

    The coarsest map makes the prior, rough connections; their means over the picture excite the map's channels in 8 slices, one for each
    direction. On the way up, what a level shows where the coarser one's scene matters is added to the encoder's maps; a light decoder
    takes the mean of all levels.

    Args:
        in_chans, num_classes, device, dtype: as in timm; 0 classes leave out the head: the output is the decoder's map, of `decoder_dim`
            channels.
        encoder: name of a hierarchical timm model, of a coarsest map whose channels 8 divides.
        encoder_args: arguments of `timm.create_model` for it, such as `pretrained` or `drop_path_rate`.
        decoder_dim: channels of the light decoder.
        drop_rate: share of channels that are dropped before the last convolutions of the excitation.

    Differences from the authors' code (Zyun-Y/DconnNet, model/DconnNet.py): what it never uses is not there (the encoder's classifier, the
    3×3 convolutions of the first feature block and before the head); the prior's 1×1 convolution comes before its interpolation,
    which gives the same. Encoders of four maps, without one of stride 2, have a level less.

    Raises:
        InputError: encoders that cannot be used, at construction.
        ValueError: an input of another shape, in `forward`.
    """

    __prepare_scriptable__ = refuse_scripting
    pretrained_cfg: dict[str, Any]
    spatial_dims = 2
    connectivity = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 2,
        encoder: str = "resnet34",
        encoder_args: Mapping[str, Any] | None = None,
        decoder_dim: int = 32,
        drop_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.encoder = TimmEncoder(encoder, in_chans, **{**dd, **(encoder_args or {})})
        dims, self.reduction = self.encoder.channels, self.encoder.reductions[-1]
        if dims[-1] % NEIGHBOURS or len(dims) < 2:
            raise InputError(f"encoder must have two maps or more, and 8 must divide the coarsest one's channels; {encoder} has {dims}")
        self.excitation = DirectionalExcitation(dims[-1], map_channels(num_classes or 1), drop_rate, **dd)
        scenes = [dims[-1], *dims[:0:-1]]
        self.spaces = nn.ModuleList(SpaceBlock(scene, dim, dim, **dd) for scene, dim in zip(scenes, dims[:0:-1], strict=False))
        self.ups = nn.ModuleList(FeatureBlock(dim, finer, spread=level > 0, **dd)
                                 for level, (dim, finer) in enumerate(zip(dims[:0:-1], dims[-2::-1], strict=True)))
        self.decoder = LightDecoder(dims[:-1], decoder_dim, **dd)
        self.num_features = self.head_hidden_size = decoder_dim
        self.grad_checkpointing = False
        self._reset_prior(map_channels(num_classes or 1))
        self.reset_classifier(num_classes)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Values of a new network, as in timm. Nothing is left for it where modules have just been made."""
        if needs_reset:
            reset_parameters(self)

    def _reset_prior(self, channels: int) -> None:
        dd: dict[str, Any] = get_device_dtype(self.excitation.proj)
        self.prior = named(**dict(conv_norm(self.encoder.channels[-1], channels, 3, bias=True, **dd).named_children()),
                           proj=nn.Conv2d(channels, channels, 1, **dd))
        self.excitation.reset_prior(channels, **dd)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head, and where there are other connections a new prior; without classes it stays as it is."""
        self.num_classes = num_classes
        channels = map_channels(num_classes)
        if num_classes and channels != cast(nn.Conv2d, self.prior.proj).out_channels:
            self._reset_prior(channels)
        dd: dict[str, Any] = get_device_dtype(self.excitation.proj)
        self.head = nn.Conv2d(self.num_features, channels, 1, **dd) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(encoder=r"^encoder", prior=r"^prior|^excitation", levels=r"^(?:spaces|ups)\.(\d+)", decoder=r"^decoder")

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's map, as large as the encoder's finest, and the prior's connections, as large as the coarsest."""
        *skips, x = self.encoder(x)
        prior = self.prior(x)
        means = interpolate(prior, self.reduction).mean((2, 3), keepdim=True)
        scene = x = self._run(self.excitation, x, means)
        levels: list[Tensor] = []
        for space, up, skip in zip(self.spaces, self.ups, reversed(skips), strict=True):
            scene = self._run(space, scene.mean((2, 3), keepdim=True), x)
            x = self._run(up, scene, skip.shape[2:]) + skip
            x = x.relu() if len(levels) < len(skips) - 1 else x
            levels.insert(0, x)
        return self._run(self.decoder, *levels), prior

    def _run(self, module: nn.Module, *args: Any) -> Tensor:
        return checkpoint(module, *args) if self.grad_checkpointing else module(*args)

    def forward_head(self, maps: tuple[Tensor, Tensor], pre_logits: bool = False,
                     size: Sequence[int] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """What the network puts out of `forward_features`, of the first `size` positions, or of all."""
        features, prior = maps
        if pre_logits or not self.num_classes:
            return self._sized(features, self.encoder.reductions[0], size)
        out = self._sized(self.head(features), self.encoder.reductions[0], size)
        return (out, self._sized(prior, self.reduction, size)) if self.training else class_logits(out, self.num_classes)

    def _sized(self, x: Tensor, reduction: int, size: Sequence[int] | None) -> Tensor:
        x = interpolate(x, reduction)
        return x if size is None else crop(x, size, by_index=True)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = checked(x, self.in_chans, 2, "DconnNet")
        return self.forward_head(self.forward_features(pad_to_multiple(x, self.reduction, "replicate")), size=x.shape[2:])


_RENAMES = [  # the authors' names → ours
    (r"^backbone\.", "encoder.model."),
    (r"^channel_mapping\.0\.", "prior.conv."),
    (r"^channel_mapping\.1\.", "prior.norm."),
    (r"^direc_reencode\.0\.", "prior.proj."),
    (r"^sde_module\.", "excitation."),
    (r"(^|\.)att(\d)\.", lambda m: f"{m[1]}heads.{int(m[2]) - 1}."),
    (r"(^|\.)final_conv\.1\.", r"\1proj."),
    (r"(^|\.)reencoder\.0\.", r"\1encode.conv1."),
    (r"(^|\.)reencoder\.2\.", r"\1encode.conv2."),
    (r"\.conv5a\.", ".position_in."),
    (r"\.conv5c\.", ".channel_in."),
    (r"\.conv51\.", ".position_out."),
    (r"\.conv52\.", ".channel_out."),
    (r"\.conv8\.1\.", ".proj."),
    (r"\.sa\.", ".position."),
    (r"\.sc\.", ".channel."),
    (r"(query|key|value)_conv\.", r"\1."),
    (r"^sb(\d)\.", lambda m: f"spaces.{int(m[1]) - 1}."),
    (r"(^|\.)scene_encoder\.0\.", r"\1scene.conv1."),
    (r"(^|\.)scene_encoder\.2\.", r"\1scene.conv2."),
    (r"(^|\.)content_encoders\.", r"\1content."),
    (r"(^|\.)feature_reencoders\.", r"\1value."),
    (r"^fb(\d)\.", lambda m: f"ups.{5 - int(m[1])}."),
    (r"(^|\.)conv_3x3\.", r"\1spread."),
    (r"(^|\.)conv_1x1\.", r"\1narrow."),
    (r"(spread|narrow)\.bn\.", r"\1.norm."),
    (r"^final_decoder\.", "decoder."),
    (r"(^|\.)blocks\.(\d)\.", r"\1levels.\2."),
    (r"^(?!encoder\.|prior\.)(.*(?:position_in|channel_in|position_out|channel_out|content|value|levels\.\d\.\d))\.0\.", r"\1.conv."),
    (r"^(?!encoder\.|prior\.)(.*(?:position_in|channel_in|position_out|channel_out|content|value|levels\.\d\.\d))\.1\.", r"\1.norm."),
    (r"^cls_pred_conv_2\.", "head."),
]
AUTHORS_NAMES = ("backbone.", "sde_module.")  # how their names begin; the first is what others' wrappers put before a whole network's
UNUSED = ("backbone.fc.", "fb5.conv_3x3.", "cls_pred_conv.")  # what the authors' network has, and never calls


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours. Of a file for other classes, the prior's parts give way to the model's own, as timm does with the head."""
    if not any(name.startswith("encoder.") for name in state_dict):  # theirs
        state_dict = {renamed(name, _RENAMES): value for name, value in state_dict.items() if not name.startswith(UNUSED)}
    own = model.state_dict()
    given, wanted = (state.get("prior.conv.weight") for state in (state_dict, own))
    if given is None or wanted is None or given.shape == wanted.shape:
        return state_dict
    kept = ("prior.", "excitation.encode.")
    return {name: own.get(name, value) if name.startswith(kept) else value for name, value in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=2, input_size=(3, 256, 256), first_conv="encoder.model.conv1", classifier="head", license="",
        origin_url="https://github.com/Zyun-Y/DconnNet", paper_ids="arXiv:2304.00145",
        paper_name="Directional Connectivity-based Segmentation of Medical Images") | kwargs


ENCODERS = {"dconnnet": "resnet34", "dconnnet_nano": "polarized_resnet_nano"}
default_cfgs = generate_default_cfgs({"dconnnet.untrained": _cfg(), "dconnnet_nano.untrained": _cfg(first_conv="encoder.model.conv1.0")})


def _dconnnet(variant: str, pretrained: bool, **kwargs: Any) -> DconnNet:
    """`pretrained` is about the encoder, where no file of weights for the whole network is named."""
    if kwargs.get("features_only"):
        raise RuntimeError(f"features_only is not implemented for {variant}: it gives maps of the input's size")
    kwargs.setdefault("encoder", ENCODERS[variant])
    pretrained = pretrained_encoder(pretrained, kwargs)
    return build_model_with_cfg(DconnNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def dconnnet(pretrained: bool = False, **kwargs: Any) -> DconnNet:
    """The authors' network, around ResNet-34; `encoder="convnext_nano"` puts any hierarchical timm model in its place."""
    return _dconnnet("dconnnet", pretrained, **kwargs)


@register_model
def dconnnet_nano(pretrained: bool = False, **kwargs: Any) -> DconnNet:
    """For small images and machines; not in the paper."""
    return _dconnnet("dconnnet_nano", pretrained, **dict(dict(decoder_dim=16), **kwargs))
