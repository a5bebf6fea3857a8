"""MSI-Net (Contextual Encoder-Decoder Network for Visual Saliency Prediction, arXiv 1902.06634): where people look in a picture.

The authors' weights (MIT licence; https://github.com/alexanderkroner/saliency) are TensorFlow's. By the names of their variables, saved
with torch or as safetensors, they load as they are, `conv1/conv1_1/kernel` and so on:

    timm.create_model("msinet", pretrained=True, pretrained_cfg_overlay=dict(file="msinet_salicon.safetensors"))

Without a file `pretrained=True` is about the encoder: timm's VGG-16, or that of `encoder`.
"""
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import get_device_dtype, register_notrace_function
from timm.models import FeatureInfo, checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.errors import InputError, near_misses
from zoo.kernels._exporting import is_exporting
from zoo.layers._spatial import crop, pad_to_multiple
from zoo.models.building import build_model_with_cfg, names_weights
from zoo.models.looking import FixationNetwork, checked
from zoo.models.staged import reset_parameters
from zoo.weights import load_weights, weights_in

__all__ = ["MSINet", "checkpoint_filter_fn"]

MECHANISM = "msinet"
HIERARCHICAL = False  # no encoder of U-Nets
DENSE = True
TASK = "fixations"
StateDict = dict[str, Tensor]
STRIDE = 8
MEANS = (103.939, 116.779, 123.68)  # VGG's of blue, green and red; the authors take them off red, green and blue, in this order
DEPTHS = (2, 2, 3, 3, 3)  # convolutions of VGG-16's stages
DILATIONS = (4, 8, 12)
EPS = 1e-7
VGG = "vgg16"


def conv_same(dim: int, out_dim: int, kernel_size: int = 3, dilation: int = 1, **dd: Any) -> nn.Conv2d:
    """A convolution that keeps the map's size."""
    return nn.Conv2d(dim, out_dim, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation, **dd)


def glorot_(convs: Iterable[nn.Module]) -> None:
    """TensorFlow's first values of convolutions: Glorot's uniform ones, bias 0."""
    for conv in convs:
        nn.init.xavier_uniform_(cast(nn.Conv2d, conv).weight)
        nn.init.zeros_(cast(nn.Parameter, conv.bias))


class Stage(nn.Sequential):
    """Convolutions `conv1`, `conv2`, … of one width, each with a ReLU after it."""

    def __init__(self, dim: int, out_dim: int, depth: int, dilation: int, **dd: Any):
        super().__init__()
        for i in range(depth):
            self.add_module(f"conv{i + 1}", conv_same(out_dim if i else dim, out_dim, dilation=dilation, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self:
            x = conv(x).relu()
        return x


class VGGEncoder(nn.Module):
    """VGG-16 whose fourth and fifth pools have stride 1, and whose fifth stage dilation 2: (B, C, 8h, 8w) → three maps (B, Cᵢ, h, w).

    The maps are those after the third, fourth and fifth pool. A pool of stride 1 looks at the next row and column, too.

    Args:
        in_chans: channels of the image.
        widths: channels of the five stages.
        pretrained: takes timm's weights of VGG-16, see `take`.
    """

    def __init__(self, in_chans: int = 3, widths: Sequence[int] = (64, 128, 256, 512, 512), pretrained: bool = False, **dd: Any):
        super().__init__()
        if len(widths) != len(DEPTHS):
            raise ValueError(f"widths must be of {len(DEPTHS)} stages, got {tuple(widths)}")
        self.channels = list(widths[2:])
        self.stages = nn.ModuleList(
            Stage(dim, out, depth, 2 if i == 4 else 1, **dd)
            for i, (dim, out, depth) in enumerate(zip((in_chans, *widths), widths, DEPTHS, strict=False)))
        self.pool, self.still = nn.MaxPool2d(2), nn.MaxPool2d(2, 1, 1)
        self.grad_checkpointing = False
        if pretrained:
            self.take(timm.create_model(VGG, pretrained=True).state_dict(), VGG)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, stage in enumerate(self.stages):
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
            # With padding on both sides and the first row and column left out, the padding is at the other ends alone.
            x = self.pool(x) if i < 3 else self.still(x)[:, :, 1:, 1:]
            maps.append(x)
        return maps[2:]

    def load_weights(self, file: str) -> None:
        """Takes the convolutions of a VGG-16 of timm's or torchvision's names in a file, see `take`."""
        self.take(weights_in(file), file)

    def take(self, state: Mapping[str, Tensor], called: str) -> None:
        """Takes the convolutions of timm's VGG-16, `features.0.weight` and so on.

        Those expect ImageNet's mean and deviation, of pixels from 0 to 1: the first convolution is changed so that it gives, of what this
        network gets, what it gave there, but at the borders, as the values of their padding are others.

        Raises InputError for weights of another network.
        """
        given = {int(match[1]): (value, state[f"features.{match[1]}.bias"])
                 for name, value in state.items() if (match := re.fullmatch(r"features\.(\d+)\.weight", name)) and value.ndim == 4}
        convs = [cast(nn.Conv2d, conv) for stage in self.stages for conv in cast(Stage, stage)]
        shapes = [tuple(given[i][0].shape) for i in sorted(given)]
        if shapes != [tuple(conv.weight.shape) for conv in convs]:
            raise InputError(f"{called} holds no weights of the encoder's {len(convs)} convolutions, features.0.weight and so on of a "
                             f"VGG-16 without batch norms; it has {len(shapes)} convolutions of such names")
        cfg: Any = timm.get_pretrained_cfg(VGG)
        with torch.no_grad():
            for conv, place in zip(convs, sorted(given), strict=True):
                weight, bias = given[place]
                if conv is convs[0]:
                    mean, std = (255 * torch.tensor(values, dtype=weight.dtype)[:, None, None] for values in (cfg.mean, cfg.std))
                    weight = weight / std
                    bias = bias + (weight * (torch.tensor(MEANS, dtype=weight.dtype)[:, None, None] - mean)).sum((1, 2, 3))
                conv.weight.copy_(weight)
                cast(nn.Parameter, conv.bias).copy_(bias)

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.grad_checkpointing = enable


class StrideEightEncoder(nn.Module):
    """Those of the maps of a timm model built with `output_stride=8` that have this stride: (B, C, H, W) → maps (B, Cᵢ, h, w)."""

    def __init__(self, name: str, in_chans: int, **args: Any):
        super().__init__()
        if not timm.is_model(name):
            raise InputError(f"encoder must be a model that timm knows, got {name!r}{near_misses(name, timm.list_models())}")
        self._args = dict(args, in_chans=in_chans, output_stride=STRIDE)
        self._name = name
        try:
            self.model = self._make()
        except (RuntimeError, AttributeError, NotImplementedError, TypeError, ValueError) as error:  # each model in its way
            raise InputError(f"encoder {name} cannot give feature maps at output stride {STRIDE}: {error}") from error
        info = cast(FeatureInfo, self.model.feature_info)
        self.taken = [i for i, reduction in enumerate(info.reduction()) if reduction == STRIDE]
        self.channels = [info.channels()[i] for i in self.taken]
        if not self.taken or self.taken[-1] != len(info.reduction()) - 1:
            raise InputError(f"encoder {name} has no output stride {STRIDE}: its maps are the input's size divided by {info.reduction()}")

    def _make(self, **more: Any) -> nn.Module:
        return timm.create_model(self._name, features_only=True, **{**self._args, **more})

    def load_weights(self, file: str) -> None:
        """Takes the weights of a classifier of the encoder's name in a file, as `zoo.weights.load_weights` reads it."""
        whole = timm.create_model(self._name, **{**self._args, "pretrained": False})
        load_weights(whole, file, new_head=True)
        overlay = {"state_dict": whole.state_dict()}
        self.model.load_state_dict(self._make(pretrained=True, pretrained_cfg_overlay=overlay).state_dict())

    def reset_parameters(self) -> None:
        """Values of a new encoder; timm's models without head have no method for that."""
        new = self._make(**get_device_dtype(self.model))
        with torch.no_grad():
            for old, value in zip((*self.model.parameters(), *self.model.buffers()), (*new.parameters(), *new.buffers()), strict=True):
                old.copy_(value)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.model(x)
        last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return [maps[i].permute(0, 3, 1, 2) if last else maps[i] for i in self.taken]

    def set_grad_checkpointing(self, enable: bool) -> None:
        network = self.model if hasattr(self.model, "set_grad_checkpointing") else self.model.model  # timm wraps some
        cast(Any, network).set_grad_checkpointing(enable)


class ContextModule(nn.Module):
    """What is around every position, near and far (section 3.2): (B, C, H, W) → (B, dim, H, W).

    A 1×1 convolution, 3×3 convolutions of dilations 4, 8 and 12, and a 1×1 convolution of the map's mean, side by side; a 1×1
    convolution of all. Each gives `dim` channels and has a ReLU after it.
    """

    def __init__(self, in_dim: int, dim: int, **dd: Any):
        super().__init__()
        self.branches = nn.ModuleList([
            conv_same(in_dim, dim, 1, **dd), *(conv_same(in_dim, dim, 3, dilation, **dd) for dilation in DILATIONS)])
        self.mean = conv_same(in_dim, dim, 1, **dd)
        self.fuse = conv_same(dim * (len(self.branches) + 1), dim, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        glorot_([*self.branches, self.mean, self.fuse])

    def forward(self, x: Tensor) -> Tensor:
        found = [branch(x).relu() for branch in self.branches]
        found.append(self.mean(x.mean((2, 3), keepdim=True)).relu().expand_as(found[0]))
        return self.fuse(torch.cat(found, 1)).relu()


class MSINet(FixationNetwork):
    """Where people look: image (B, in_chans, H, W) → map (B, 1, H, W) from 0 to 1, of any size; `MSINet.density` gives it unscaled.

    Maps of the encoder at stride 8, beside one another; `ContextModule`; three times the map `enlarged` twofold, a 3×3 convolution and a
    ReLU; a 3×3 convolution to one map, `scaled`. Sizes that 8 does not divide are padded at the ends with the last row and column, and
    the map is cut before it is scaled.

    Args:
        in_chans: channels of the image, RGB from 0 to 255 less `MEANS`, which is what the model's `pretrained_cfg` says.
        num_classes: 1.
        encoder: "vgg16", or a timm model that can have output stride 8.
        encoder_args: further arguments of the encoder, for example `pretrained`; of VGG-16 its `widths`.
        dim: channels of the context; the decoder's are a half, a quarter and an eighth of it.

    Difference from the authors' code (alexanderkroner/saliency, model.py): any size, any encoder, channels first.

    Raises:
        ValueError: arguments outside what is said above, at construction; an input of another shape, in `forward`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        encoder: str = VGG,
        encoder_args: Mapping[str, Any] | None = None,
        dim: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_classes)
        if dim < 8:
            raise ValueError(f"dim must be at least 8, got {dim}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        args = {**dd, **(encoder_args or {})}
        self.in_chans, self.reduction = in_chans, STRIDE
        self.encoder = VGGEncoder(in_chans, **args) if encoder == VGG else StrideEightEncoder(encoder, in_chans, **args)
        self.context = ContextModule(sum(self.encoder.channels), dim, **dd)
        dims = [dim, dim // 2, dim // 4, dim // 8]
        self.decoder = nn.ModuleList(conv_same(narrow, out, **dd) for narrow, out in zip(dims, dims[1:], strict=False))
        self.head = conv_same(dims[-1], 1, **dd)
        self.num_features = self.head_hidden_size = dims[-1]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First values of the decoder; other parts have their own."""
        glorot_([*self.decoder, self.head])

    def load_encoder(self, file: str) -> None:
        """Takes the weights of VGG-16, or of the encoder, in a file."""
        self.encoder.load_weights(file)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Values of a new network, as in timm. Nothing is left for it where modules have just been made."""
        if needs_reset:
            reset_parameters(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        encoder = r"^encoder\.stages\.(\d+)" if isinstance(self.encoder, VGGEncoder) else r"^encoder"
        return dict(encoder=encoder, context=r"^context", decoder=r"^decoder\.(\d+)")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, dim / 8, H, W), of an image whose sizes 8 divides."""
        x = self.context(torch.cat(self.encoder(x), 1))
        for conv in self.decoder:
            x = conv(enlarged(x)).relu()
        return x

    def density(self, x: Tensor) -> Tensor:
        """The map before it is scaled, (B, 1, H, W)."""
        x = checked(x, self.in_chans, "MSINet")
        return crop(self.head(self.forward_features(pad_to_multiple(x, STRIDE, "replicate"))), x.shape[2:], by_index=True)

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.density(x))


@register_notrace_function
def enlarged(x: Tensor) -> Tensor:
    """Twice as large, as TensorFlow 1's bilinear resizing has it: (B, C, H, W) → (B, C, 2H, 2W).

    Along each axis y_{2i} = x_i and y_{2i+1} = (x_i + x_{i+1}) / 2, the last of x being repeated: neither of PyTorch's `align_corners`.
    """
    for axis in (2, 3):
        last = x.shape[axis] - 1
        if is_exporting():  # by index, which asks nothing of the sizes
            place = torch.arange(2 * x.shape[axis], device=x.device)
            x = (x.index_select(axis, place // 2) + x.index_select(axis, ((place + 1) // 2).clamp(max=last))) / 2
            continue
        following = x.index_select(axis, torch.arange(1, last + 2, device=x.device).clamp(max=last))
        x = torch.stack([x, (x + following) / 2], axis + 1).flatten(axis, axis + 1)
    return x


def scaled(x: Tensor) -> Tensor:
    """(x - min x) / (1e-7 + max (x - min x)), of every picture by itself, in float32 at least; (B, 1, H, W) → the same shape and dtype."""
    m = x.to(torch.promote_types(x.dtype, torch.float32))
    m = m - m.amin((1, 2, 3), keepdim=True)
    return (m / (EPS + m.amax((1, 2, 3), keepdim=True))).to(x.dtype)


_TENSORFLOWS = [  # the authors' names → ours
    (re.compile(r"conv(\d)/conv\d_(\d)"), lambda m: f"encoder.stages.{int(m[1]) - 1}.conv{m[2]}"),
    (re.compile(r"aspp/conv1_([1-4])"), lambda m: f"context.branches.{int(m[1]) - 1}"),
    (re.compile(r"aspp/conv1_5"), lambda m: "context.mean"),
    (re.compile(r"aspp/conv2"), lambda m: "context.fuse"),
    (re.compile(r"decoder/conv([1-3])"), lambda m: f"decoder.{int(m[1]) - 1}"),
    (re.compile(r"decoder/conv4"), lambda m: "head"),
]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """TensorFlow's names and order of axes, (height, width, in, out), → ours; what stands behind a colon, as in `kernel:0`, is left."""
    found = {}
    for name, value in state_dict.items():
        place, _, kind = name.partition(":")[0].rpartition("/")
        ours = next((ours(match) for pattern, ours in _TENSORFLOWS if (match := pattern.fullmatch(place))), None)
        if ours and kind == "kernel" and value.ndim == 4:
            found[f"{ours}.weight"] = value.permute(3, 2, 0, 1).contiguous()
        else:
            found[f"{ours}.{kind}" if ours else name] = value
    return found


def _cfg(**kwargs: Any) -> dict[str, Any]:
    cfg = dict(
        num_classes=1, input_size=(3, 240, 320), mean=tuple(mean / 255 for mean in MEANS), std=(1 / 255,) * 3, interpolation="bilinear",
        crop_pct=1.0, first_conv="encoder.stages.0.conv1", classifier=None, license="mit",
        origin_url="https://github.com/alexanderkroner/saliency", paper_ids="arXiv:1902.06634",
        paper_name="Contextual Encoder-Decoder Network for Visual Saliency Prediction")
    return cfg | kwargs


default_cfgs = generate_default_cfgs({
    "msinet.salicon": _cfg(),
    "msinet_nano.untrained": _cfg(input_size=(3, 96, 128)),
})


def _msinet(variant: str, pretrained: bool, **kwargs: Any) -> MSINet:
    """`pretrained` is about the encoder, unless weights of the whole network are named."""
    if kwargs.get("features_only"):
        raise RuntimeError(f"features_only is not implemented for {variant}: it gives a map of the input's size")
    if pretrained and not names_weights(kwargs):
        pretrained, kwargs["encoder_args"] = False, dict(kwargs.get("encoder_args") or {}, pretrained=True)
    encoder = kwargs.get("encoder", VGG)
    model = build_model_with_cfg(MSINet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
    if encoder != VGG:
        cfg: Any = timm.get_pretrained_cfg(encoder)
        model.pretrained_cfg |= dict(first_conv=None, **({"mean": cfg.mean, "std": cfg.std} if cfg else {}))
    return model


@register_model
def msinet(pretrained: bool = False, **kwargs: Any) -> MSINet:
    """The authors' network, around VGG-16; `encoder="resnet50"` puts any timm model with output stride 8 in its place."""
    return _msinet("msinet", pretrained, **kwargs)


@register_model
def msinet_nano(pretrained: bool = False, **kwargs: Any) -> MSINet:
    """For small images and machines, of an eighth of the widths; not in the paper."""
    args = dict(kwargs)
    if args.get("encoder", VGG) == VGG:
        args["encoder_args"] = dict(dict(widths=(8, 16, 32, 64, 64)), **(args.get("encoder_args") or {}))
    return _msinet("msinet_nano", pretrained, **dict(dict(dim=32), **args))
