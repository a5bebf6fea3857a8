"""InSPyReNet (arXiv 2209.09475): where the object is, to cut it out of a picture, as a Laplacian pyramid of logits.

The authors' checkpoints (MIT licence, docs/model_zoo.md of https://github.com/plemeri/InSPyReNet, and those of transparent-background) load
as they are:

    timm.create_model("inspyrenet_swin_b", pretrained=True, pretrained_cfg_overlay=dict(file="latest.pth"))
"""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, PatchEmbed, register_notrace_function, to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.layers import PyramidAxialAttention, ScaleInvariantContextAttention
from zoo.layers._scripting import refuse_scripting
from zoo.layers._spatial import crop, pad_to_multiple
from zoo.layers._tracing import notrace_module
from zoo.layers.image_pyramid import reconstruct, to_size, transition
from zoo.layers.pyramid_attention import AxialAttention, ConvNorm, Reshapes
from zoo.models.building import build_model_with_cfg, names_weights
from zoo.models.conversion import renamed
from zoo.models.encoders import TimmEncoder
from zoo.models.staged import reset_parameters, stochastic_depth, truncated_normal_
from zoo.weights import load_weights

__all__ = ["InSPyReNet", "Pyramid", "PyramidDecoder", "blend", "checkpoint_filter_fn", "scaled"]

MECHANISM = "inspyrenet"
HIERARCHICAL = False  # no encoder of U-Nets
DENSE = True
TASK = "saliency"
StateDict = dict[str, Tensor]
REDUCTIONS = (4, 8, 16, 32)
TRANSITIONS = (17, 9, 5)  # sizes of the ellipses of `blend`, finest first


class Pyramid(NamedTuple):
    """Logits of an image of H × W: d3 (B, 1, H/8, W/8), and d_i = reconstruct(d_{i+1}, p_i), up to d0 of the image's size."""

    d3: Tensor
    p2: Tensor
    d2: Tensor
    p1: Tensor
    d1: Tensor
    p0: Tensor
    d0: Tensor


class FiveMaps(TimmEncoder):
    """A timm model's maps at strides 4, 8, 16 and 32, and before them that at 2, or where there is none, that at 4 again."""

    def __init__(self, name: str, in_chans: int, **args: Any):
        super().__init__(name, in_chans, **args)
        if missing := [stride for stride in REDUCTIONS if stride not in self.reductions]:
            raise InputError(f"encoder {name} has no maps at strides {', '.join(map(str, missing))}: its are at {self.reductions}, and "
                             f"InSPyReNet takes {', '.join(map(str, REDUCTIONS))}")
        self.picked = [self.reductions.index(stride) for stride in (2 if 2 in self.reductions else 4, *REDUCTIONS)]
        self.channels = [self.channels[i] for i in self.picked]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = super().forward(x)
        return [maps[i] for i in self.picked]


class DilatedRes2Net(FiveMaps):
    """timm's `res2net50d`, names and shapes, whose 3×3 convolutions reach further in its last stages; the first map is behind the pooling.

    Their dilation is 2 in layer3, and 4, 8, 16 in the blocks of layer4, at unchanged strides, as in the authors'
    lib/backbones/Res2Net_v1b.py. Further blocks than those of the released networks go on with the last.
    """

    def __init__(self, in_chans: int, **args: Any):
        super().__init__("res2net50d", in_chans, **args)

    def _make(self, **more: Any) -> nn.Module:
        model = super()._make(**more)
        for stage, dilations in (("layer3", (2,)), ("layer4", (4, 8, 16))):
            for i, block in enumerate(cast(Any, model)[stage]):
                for conv in block.convs:
                    conv.dilation = conv.padding = to_2tuple(dilations[min(i, len(dilations) - 1)])
        return model

    def forward(self, x: Tensor) -> list[Tensor]:
        first, *rest = super().forward(x)
        return [F.max_pool2d(first, 3, 2, 1), *rest]


@notrace_module
class WindowBlock(nn.Module):
    """A block of Swin on (B, H, W, C), padded to whole windows before it is shifted."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, mlp_ratio: float, drop_path: float, **dd: Any):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim, **dd), nn.LayerNorm(dim, **dd)
        self.attn = WindowAttention(dim, num_heads, window_size=window, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._attended(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attended(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        w, shift = self.window, self.shift
        rows, columns = (height + w - 1) // w, (width + w - 1) // w
        x = F.pad(x, (0, 0, 0, columns * w - width, 0, rows * w - height))
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        windows = x.reshape(batch, rows, w, columns, w, dim).transpose(2, 3).reshape(-1, w * w, dim)
        windows = self.attn(windows, self._mask(rows, columns, x) if shift else None)
        x = windows.reshape(batch, rows, columns, w, w, dim).transpose(2, 3).reshape(batch, rows * w, columns * w, dim)
        x = torch.roll(x, (shift, shift), (1, 2)) if shift else x
        return x.narrow(1, 0, height).narrow(2, 0, width)

    def _mask(self, rows: int, columns: int, x: Tensor) -> Tensor:
        """(windows, N, N): -100 between positions that the shift has brought together from opposite borders."""
        of_rows, of_columns = (self._sides(n, x.device) for n in (rows, columns))
        side = (3 * of_rows[:, None, :, None] + of_columns[None, :, None, :]).reshape(rows * columns, -1)
        return torch.where(side[:, :, None] == side[:, None, :], 0.0, -100.0).to(x.dtype)

    def _sides(self, count: int, device: torch.device) -> Tensor:
        """(windows, places in each): 1 in the last window, 2 where it shows the other border, else 0."""
        places = torch.arange(count * self.window, device=device)
        return ((places >= (count - 1) * self.window).long() + (places >= count * self.window - self.shift)).reshape(count, self.window)


class WindowStage(nn.Module):
    """Blocks of Swin on (B, H, W, C), every other of them shifted by half a window, whatever the map's size."""

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float, rates: Sequence[float], **dd: Any):
        super().__init__()
        self.blocks = nn.ModuleList(
            WindowBlock(dim, num_heads, window, i % 2 * (window // 2), mlp_ratio, rate, **dd) for i, rate in enumerate(rates))
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x


class PaddedSwin(nn.Module):
    """Swin that pads maps to whole windows before it shifts them, as Swin's authors do for dense tasks; timm pads them afterwards.

    Five maps: the patches after their norm, before the first stage, and every stage's after a norm of its own. Weights of timm's network of
    the same widths are taken but for its last norm. Where windows divide the maps the two are one function.

    Args:
        in_chans, embed_dim, depths, num_heads, window_size, mlp_ratio, drop_path_rate, device, dtype: as in timm.
        pretrained, pretrained_cfg_overlay: of timm's `swin_base_patch4_window12_384`.
    """

    TIMM = "swin_base_patch4_window12_384"

    def __init__(
        self, in_chans: int = 3, embed_dim: int = 128, depths: Sequence[int] = (2, 2, 18, 2), num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 12, mlp_ratio: float = 4.0, drop_path_rate: float = 0.0, pretrained: bool = False,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None, device: Any = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.args = dict(in_chans=in_chans, embed_dim=embed_dim, depths=depths, num_heads=num_heads, window_size=window_size,
                         mlp_ratio=mlp_ratio)
        self.start = dict(pretrained=True, pretrained_cfg_overlay=pretrained_cfg_overlay) if pretrained else None
        self.channels, self.reductions = [embed_dim, *widths], [4, *REDUCTIONS]
        self.patch_embed = PatchEmbed(None, 4, in_chans, embed_dim, norm_layer=nn.LayerNorm, flatten=False, output_fmt="NHWC",
                                      strict_img_size=False, **dd)
        self.layers = nn.ModuleList(
            WindowStage(width, heads, window_size, mlp_ratio, rates, **dd)
            for width, heads, rates in zip(widths, num_heads, stochastic_depth(drop_path_rate, depths), strict=True))
        for stage, width in zip(self.layers[:-1], widths, strict=False):
            cast(nn.Module, stage).add_module("downsample", PatchMerging(width, **dd))
        self.norms = nn.ModuleList(nn.LayerNorm(width, **dd) for width in widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                truncated_normal_(module)
        if self.start is not None:
            self._take(self._timms(**self.start))

    def load_weights(self, file: str) -> None:
        """Takes the weights of a classifier, timm's `swin_base_patch4_window12_384` or of these widths, in a file."""
        whole = self._timms()
        load_weights(whole, file, new_head=True)
        self._take(whole)

    def _timms(self, **args: Any) -> nn.Module:
        return timm.create_model(self.TIMM, num_classes=0, **self.args, **args)

    def _take(self, whole: nn.Module) -> None:
        state = {renamed(name, [(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample")]): value
                 for name, value in whole.state_dict().items() if not name.startswith(("norm.", "head."))}
        own = {f"norms.{name}": value for name, value in self.norms.state_dict().items()}
        self.load_state_dict(state | own)

    def set_grad_checkpointing(self, enable: bool) -> None:
        for stage in self.layers:
            cast(WindowStage, stage).grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        maps = [x]
        for stage, norm in zip(self.layers, self.norms, strict=True):
            x = stage(x)
            maps.append(norm(x))
            x = cast(Any, stage).downsample(x) if hasattr(stage, "downsample") else x
        return [y.permute(0, 3, 1, 2) for y in maps]


class StartingDecoder(nn.Module):
    """The coarsest logits, of three maps of one width each: the authors' PAA_d (lib/modules/decoder_module.py).

    x = CB₃ of the coarser two, interpolated corner to corner to the first's size, and the first; x = h(x) + w(x), `AxialAttention` along
    either axis; three CB₃, whose output is the first result; a 3×3 convolution, whose output is the second, (B, 1, H, W).
    """

    def __init__(self, dim: int, out_dim: int, reshapes: Reshapes, **dd: Any):
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim, 3, **dd)
        self.rows, self.columns = (AxialAttention(out_dim, axis, reshapes, **dd) for axis in ("h", "w"))
        self.conv2, self.conv3, self.conv4 = (ConvNorm(out_dim, out_dim, 3, **dd) for _ in range(3))
        self.conv5 = nn.Conv2d(out_dim, 1, 3, padding=1, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv5.weight, nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        size = maps[0].shape[2:]
        x = self.conv1(torch.cat([*(to_size(y, size, align_corners=True) for y in reversed(maps[1:])), maps[0]], 1))
        x = self.conv4(self.conv3(self.conv2(self.rows(x) + self.columns(x))))
        return x, self.conv5(x)


class PyramidDecoder(nn.Module):
    """From five maps, finest first, to the `Pyramid` of logits of an image whose size 32 divides.

    Args:
        channels: of the maps. All but the first are at strides 4, 8, 16, 32; the first is interpolated to half the image's size.
        dim: width of everything, at least 8.
        base_size: (height, width) that the network was trained at; contexts are summed at it, at half and at a quarter of it.
        reshapes: see `zoo.layers.AxialAttention` and `zoo.layers.ScaleInvariantContextAttention`.

    `forward` takes the maps and the image's size.
    """

    def __init__(self, channels: Sequence[int], dim: int = 64, base_size: tuple[int, int] = (384, 384), reshapes: Reshapes = "as_trained",
                 **dd: Any):
        super().__init__()
        self.context = nn.ModuleList(PyramidAxialAttention(width, dim, reshapes=reshapes, **dd) for width in channels)
        self.start = StartingDecoder(3 * dim, dim, reshapes, **dd)
        sizes = [(base_size[0] >> stage, base_size[1] >> stage) for stage in range(3)]
        self.refine = nn.ModuleList(
            ScaleInvariantContextAttention(dim * (1 + (stage > 0)), dim, sizes[stage], stage < 2, reshapes, **dd) for stage in range(3))
        self.grad_checkpointing = False

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Pyramid:
        height, width = size[0], size[1]  # of torch.fx, which iterates nothing
        e1, e2, *coarse = (self._run(context, x) for context, x in zip(self.context, maps, strict=True))
        quarter, half = (height // 4, width // 4), (height // 2, width // 2)
        f3, d3 = self._run(self.start, coarse)
        f2, p2 = self._run(self.refine[2], torch.cat([e2, to_size(f3, quarter)], 1), d3.detach())
        d2 = reconstruct(d3.detach(), p2)
        f1, p1 = self._run(self.refine[1], torch.cat([to_size(e1, half), to_size(f2, half)], 1), d2.detach(), p2.detach())
        d1 = reconstruct(d2.detach(), p1)
        _, p0 = self._run(self.refine[0], to_size(f1, (height, width)), d1.detach(), p1.detach())
        return Pyramid(d3, p2, d2, p1, d1, p0, reconstruct(d1.detach(), p0))

    def _run(self, module: nn.Module, *inputs: Any) -> Any:
        return checkpoint(module, *inputs) if self.grad_checkpointing else module(*inputs)


OWN_ENCODERS = {"swin_padded": PaddedSwin, "res2net50d_dilated": DilatedRes2Net}


class InSPyReNet(nn.Module):
    """Logits of whether a pixel is of the salient object, made coarse to fine (arXiv 2209.09475).

    (B, in_chans, H, W) → (B, 1, H, W), any sizes: inside, the last rows and columns are repeated up to multiples of 32. `pyramid` gives the
    logits of all levels. Networks see pictures best at `base_size`; of larger ones `zoo.predicting.cutouts` makes the answer of two passes,
    by `blend`. `scaled` makes alpha of logits as the authors do.

    Args:
        in_chans, device, dtype: as in timm.
        num_classes: 1, as there is one kind of logits.
        encoder: name of any timm model with maps at strides 4, 8, 16 and 32, or "swin_padded" or "res2net50d_dilated", `PaddedSwin` and
            `DilatedRes2Net`, for which there are the authors' weights.
        encoder_args: arguments of `timm.create_model` for it, such as `pretrained` or `drop_path_rate`.
        dim: width of the decoder, at least 8.
        base_size: (height, width) that it is trained at; 32 divides both.
        reshapes: "as_trained", what the released weights need, or "meant", see `zoo.layers.AxialAttention` and
            `zoo.layers.ScaleInvariantContextAttention`.

    Differences from the authors' code (plemeri/InSPyReNet, lib/InSPyReNet.py): any size of input, any encoder; contexts are summed in
    float32 at least.

    Raises:
        ValueError: arguments outside what is said above, at construction; an input of another shape, in `forward`.
    """

    __prepare_scriptable__ = refuse_scripting
    pretrained_cfg: dict[str, Any]
    task = TASK

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        encoder: str = "swin_padded",
        encoder_args: Mapping[str, Any] | None = None,
        dim: int = 64,
        base_size: Sequence[int] = (384, 384),
        reshapes: Reshapes = "as_trained",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.reset_classifier(num_classes)
        if len(base_size) != 2 or any(n < 32 or n % 32 for n in base_size):
            raise ValueError(f"base_size must be two multiples of 32, got {tuple(base_size)}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        args = {**dd, **(encoder_args or {})}
        own = OWN_ENCODERS.get(encoder)
        self.in_chans, self.base_size, self.reduction = in_chans, (base_size[0], base_size[1]), REDUCTIONS[-1]
        self.backbone = FiveMaps(encoder, in_chans, **args) if own is None else own(in_chans=in_chans, **args)
        self.decoder = PyramidDecoder(self.backbone.channels, dim, self.base_size, reshapes, **dd)
        self.num_features = self.head_hidden_size = dim

    def init_weights(self, needs_reset: bool = True) -> None:
        """Values of a new network, as in timm. Nothing is left for it where modules have just been made."""
        if needs_reset:
            reset_parameters(self)

    def load_encoder(self, file: str) -> None:
        """Takes the weights of a classifier with the encoder's name in a file."""
        cast(Any, self.backbone).load_weights(file)

    def get_classifier(self) -> nn.Module:
        """What makes the finest level's logits."""
        return cast(ScaleInvariantContextAttention, self.decoder.refine[0]).logits

    def reset_classifier(self, num_classes: int) -> None:
        if num_classes != 1:
            raise ValueError(f"num_classes must be 1, the salient object, got {num_classes}")
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.decoder.grad_checkpointing = enable
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(backbone=r"^backbone", context=r"^decoder\.context", start=r"^decoder\.start", refine=r"^decoder\.refine\.(\d+)")

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The encoder's five maps, finest first; 32 divides the image's sizes."""
        return self.backbone(x)

    def pyramid(self, x: Tensor) -> Pyramid:
        """All logits of an image (B, in_chans, H, W) whose sizes 32 divides."""
        x = checked(x, self.in_chans, self.reduction)
        return self.decoder(self.forward_features(x), x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        x = checked(x, self.in_chans, 1)
        padded = pad_to_multiple(x, self.reduction, "replicate")
        return crop(self.decoder(self.forward_features(padded), padded.shape[2:]).d0, x.shape[2:], by_index=True)


@register_notrace_function
def checked(x: Tensor, in_chans: int, multiple: int) -> Tensor:
    """x, unless it is of another shape."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"InSPyReNet: x must be (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
    if multiple > 1 and any(n % multiple for n in x.shape[2:]):
        raise ValueError(f"InSPyReNet: sizes must be multiples of {multiple}, got shape {tuple(x.shape)}")
    return x


def blend(low: Tensor, high: Pyramid) -> Pyramid:
    """The answer for a large picture: what the base size says of where the object is, and details of the full size at its edges.

    d3 is `low`, interpolated; then, finer step by step, d_i = reconstruct(d_{i+1}, transition(d_{i+1}) · p_i) with `high`'s p_i, and
    `zoo.layers.image_pyramid.transition` of ellipses of 5, 9 and 17 (arXiv 2209.09475, section 3.4; the authors' forward_inference).

    Args:
        low: logits d0 of the picture at the base size, (B, 1, h, w).
        high: of the picture itself; of its d only the sizes count.
    """
    d = [to_size(low, high.d3.shape[2:])]
    for details, kernel in zip((high.p2, high.p1, high.p0), reversed(TRANSITIONS), strict=True):
        edges = to_size(transition(d[-1], kernel), details.shape[2:])
        d.append(reconstruct(d[-1], edges * details))
    return Pyramid(d[0], high.p2, d[1], high.p1, d[2], high.p0, d[3])


def scaled(logits: Tensor) -> Tensor:
    """Alpha of every picture: (p - min p) / (max p - min p + 1e-8), p = σ(logits); (B, 1, H, W) → the same shape, from 0 to 1.

    The authors take the extremes of the batch, so that a picture's answer hangs on others; here they are the picture's.
    """
    p = logits.sigmoid()
    least, most = p.amin((1, 2, 3), keepdim=True), p.amax((1, 2, 3), keepdim=True)
    return (p - least) / (most - least + 1e-8)


_RENAMES = [  # the authors' names outside of the encoder → ours
    (r"^context(\d)\.", lambda m: f"decoder.context.{int(m[1]) - 1}."),
    (r"^decoder\.(?!context)", "decoder.start."),
    (r"^attention(\d)\.", r"decoder.refine.\1."),
    (r"(^|\.)branch0\.", r"\1narrow."),
    (r"(^|\.)branch(\d)\.", lambda m: f"{m[1]}branches.{int(m[2]) - 1}."),
    (r"(^|\.)conv_cat\.", r"\1fuse."),
    (r"(^|\.)conv_res\.", r"\1shortcut."),
    (r"(^|\.)Hattn\.", r"\1rows."),
    (r"(^|\.)Wattn\.", r"\1columns."),
    (r"(^|\.)(query|key|value)_conv\.", r"\1\2."),
    (r"(^|\.)conv_(query|key|value)\.", r"\1\2."),
    (r"(^|\.)conv_out4\.", r"\1logits."),
    (r"(^|\.)conv_(out\d)\.", r"\1\2."),
    (r"(^|\.)conv5\.conv\.", r"\1conv5."),
    (r"(^|\.)lthreshold$", r"\1laplacian_threshold"),
    (r"\.bn\.", ".norm."),
]
INDICES = "relative_position_index"  # of Swin: no weights, and made with the network


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours, for whole networks, their Swin, and single layers."""
    if any(name.startswith("decoder.start.") for name in state_dict):  # ours
        return state_dict
    swin = isinstance(model, PaddedSwin)
    prefix = "" if swin else "backbone." if isinstance(getattr(model, "backbone", None), PaddedSwin) else "backbone.model."
    found = {}
    for name, value in state_dict.items():
        if name.endswith(INDICES):
            continue
        if swin or name.startswith("backbone."):
            found[prefix + renamed(name.removeprefix("backbone."), [(r"^norm(\d)\.", r"norms.\1.")])] = value
        else:
            found[renamed(name, _RENAMES)] = value
    return found


def _cfg(**kwargs: Any) -> dict[str, Any]:
    cfg = dict(
        num_classes=1, input_size=(3, 384, 384), mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, interpolation="bilinear",
        crop_pct=1.0, first_conv=None, classifier=None, license="mit", origin_url="https://github.com/plemeri/InSPyReNet",
        paper_ids="arXiv:2209.09475",
        paper_name="Revisiting Image Pyramid Structure for High Resolution Salient Object Detection")
    return cfg | kwargs


default_cfgs = generate_default_cfgs({
    "inspyrenet.untrained": _cfg(),
    "inspyrenet_swin_b.plus_ultra": _cfg(
        url="https://github.com/plemeri/transparent-background/releases/download/1.2.12/ckpt_fast.pth",
        first_conv="backbone.patch_embed.proj"),
    "inspyrenet_res2net50.duts": _cfg(first_conv="backbone.model.conv1.0"),
    "inspyrenet_nano.untrained": _cfg(input_size=(3, 96, 96)),
})


def _inspyrenet(variant: str, pretrained: bool, **kwargs: Any) -> InSPyReNet:
    """`pretrained` is about the encoder, unless weights of the whole network are named, or offered by its authors."""
    if kwargs.get("features_only"):
        raise RuntimeError(f"features_only is not implemented for {variant}: it gives a map of the input's size")
    if pretrained and not names_weights(kwargs) and not cast(Any, timm.get_pretrained_cfg(variant)).url:
        pretrained, kwargs["encoder_args"] = False, dict(kwargs.get("encoder_args") or {}, pretrained=True)
    return build_model_with_cfg(InSPyReNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def inspyrenet(pretrained: bool = False, **kwargs: Any) -> InSPyReNet:
    """Around `encoder`, any hierarchical timm model, ConvNeXt-Nano by default."""
    return _inspyrenet("inspyrenet", pretrained, **dict(dict(encoder="convnext_nano"), **kwargs))


@register_model
def inspyrenet_swin_b(pretrained: bool = False, **kwargs: Any) -> InSPyReNet:
    """The authors' larger network, around Swin-B; also that of transparent-background, whose weights `pretrained=True` takes.

    They are those of its mode "fast". Those of its mode "base", ckpt_base.pth beside them, are for `base_size=(1024, 1024)`.
    """
    return _inspyrenet("inspyrenet_swin_b", pretrained, **dict(dict(encoder="swin_padded"), **kwargs))


@register_model
def inspyrenet_res2net50(pretrained: bool = False, **kwargs: Any) -> InSPyReNet:
    """The authors' smaller network, around a dilated Res2Net-50."""
    return _inspyrenet("inspyrenet_res2net50", pretrained, **dict(dict(encoder="res2net50d_dilated"), **kwargs))


@register_model
def inspyrenet_nano(pretrained: bool = False, **kwargs: Any) -> InSPyReNet:
    """For small images and machines, around `sknet_nano`; not in the paper."""
    args = dict(encoder="sknet_nano", dim=16, base_size=(96, 96), reshapes="meant")
    return _inspyrenet("inspyrenet_nano", pretrained, **dict(args, **kwargs))
