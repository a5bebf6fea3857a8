"""AttNet (arXiv 2510.20092): attentive convolutions and convolutional gated linear units in four stages.

The authors' checkpoints (MIT licence; https://github.com/price112/Attentive-Convolution) load as they are:

    timm.create_model("attnet_t2", pretrained=True, pretrained_cfg_overlay=dict(file="AttNet_T2.pth"))
"""
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, NormMlpClassifierHead
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels._layout import channels_last
from zoo.layers import ATConv
from zoo.layers._plain import is_plain
from zoo.layers._positions_first import ChannelNorm, depthwise, pointwise, positions_first
from zoo.layers._tracing import notrace_module
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.staged import StagedNetwork, downsampling, named, stochastic_depth

__all__ = ["AttNet", "GatedMlp", "checkpoint_filter_fn"]

MECHANISM = "atconv"
ATTACHABLE = ATConv
StateDict = dict[str, Tensor]
REPORTED_IN = "the paper's abstract"
REPORTED_TOP1 = {"attnet_t2": 84.4}


@notrace_module
class GatedMlp(nn.Module):
    """The convolutional gated linear unit of AttNet.

        g, v = fc1(x),  y = GELU(dwconv3×3(g)) ⊙ v,  out = fc2(w ⊙ y / rms(y)) over channels; without norm fc2(y)

    (B, C, H, W) → (B, C, H, W). The division by the root mean square comes after `fc2`, with which it commutes and where
    there are fewer channels; in float16, whose range it protects, before. Without gradients on the CPU, y is made some
    channels at a time, whose part of the sum in `fc2` is added up while the caches hold them. Where one of the modules has
    hooks or is not what was built here (adapters, quantization, pruning), they are called one after the other instead.
    """

    SLICE, FEWEST = 1 << 21, 64  # numbers in a slice of y, but no fewer channels than this
    ALIGNED = 16  # channels whose rows begin with a cache line: products are up to 1.5 times as fast

    def __init__(
        self, dim: int, hidden: int, norm: bool, eps: float = 1e-6,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.hidden, self.eps = hidden, eps
        self.fc1 = nn.Conv2d(dim, 2 * hidden, 1, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.norm = nn.RMSNorm(hidden, eps=eps, **dd) if norm else None
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not all(is_plain(module, nn.RMSNorm if name == "norm" else nn.Conv2d) for name, module in self.named_children()):
            gate, value = self.fc1(x).chunk(2, 1)
            y = F.gelu(self.dwconv(gate)) * value
            return self.fc2(y if self.norm is None else self.norm(y.movedim(1, -1)).movedim(-1, 1))
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return self._whole(x)
        width = max(self.FEWEST, self.SLICE // max(1, x.numel() // x.shape[1]))
        return self._whole(x) if width >= self.hidden or torch.is_autocast_enabled("cpu") else self._in_slices(x, width)

    def _whole(self, x: Tensor) -> Tensor:
        y = self._gated(x, slice(None))
        if self.norm is None:
            return pointwise(y, self.fc2.weight, self.fc2.bias)
        if y.dtype == torch.float16:
            return pointwise(self.norm(y.permute(2, 3, 0, 1)).permute(2, 3, 0, 1), self.fc2.weight, self.fc2.bias)
        return self._normalized(pointwise(y, self._weight(), None), _squares(y))

    def _in_slices(self, x: Tensor, width: int) -> Tensor:
        width = -(-self.hidden // -(-self.hidden // width))  # as many slices, of one width
        width = -(-width // self.ALIGNED) * self.ALIGNED
        out, squares = 0, 0
        for start in range(0, self.hidden, width):
            channels = slice(start, start + width)
            y = self._gated(x, channels)
            out += pointwise(y, self._weight()[:, channels], None)
            squares += 0 if self.norm is None else _squares(y)
        out, squares = cast(Tensor, out), cast(Tensor, squares)
        return out.add_(cast(Tensor, self.fc2.bias)[:, None, None]) if self.norm is None else self._normalized(out, squares)

    def _gated(self, x: Tensor, channels: slice) -> Tensor:
        """Those channels of y. The halves of fc1 apart, as those of one result would have to be copied."""
        (gate, value), (gate_bias, value_bias) = self.fc1.weight.chunk(2), cast(Tensor, self.fc1.bias).chunk(2)
        weight, bias = self.dwconv.weight, cast(Tensor, self.dwconv.bias)
        gated = depthwise(pointwise(x, gate[channels], gate_bias[channels]), weight[channels], bias[channels])
        value = pointwise(x, value[channels], value_bias[channels])
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.gelu(gated) * value
        return torch.ops.aten.gelu_(gated).mul_(value)  # a fresh map costs as much as the arithmetic

    def _weight(self) -> Tensor:
        return self.fc2.weight if self.norm is None else self.fc2.weight * self.norm.weight[:, None, None]

    def _normalized(self, out: Tensor, squares: Tensor) -> Tensor:
        bias = cast(Tensor, self.fc2.bias)
        return torch.addcmul(bias[:, None, None], out, (squares / self.hidden + self.eps).rsqrt().to(out.dtype))


def _squares(y: Tensor) -> Tensor:
    """Sum of squares over channels, at least in float32."""
    return torch.linalg.vector_norm(y, dim=1, keepdim=True, dtype=torch.promote_types(y.dtype, torch.float32)).square()


class Block(nn.Module):
    """Attentive convolution and gated MLP, each behind a LayerNorm, scaled and added."""

    def __init__(
        self, dim: int, kernel_size: int, mlp_ratio: float, mlp_norm: bool, layer_scale: bool, drop_path: float, **dd: Any,
    ):
        super().__init__()
        self.norm1 = ChannelNorm(dim, eps=1e-6, **dd)
        self.attn = ATConv(dim, kernel_size, **dd)
        self.ls1 = LayerScale2d(dim, 1e-6, **dd) if layer_scale else nn.Identity()
        self.norm2 = ChannelNorm(dim, eps=1e-6, **dd)
        self.mlp = GatedMlp(dim, 2 * int(dim * mlp_ratio) // 3, mlp_norm, **dd)
        self.ls2 = LayerScale2d(dim, 1e-6, **dd) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """Downsampling and blocks; NCHW → NCHW.

    Inside, maps lie in memory as (H, W, B, C), which none of the layers has to copy (see `zoo.layers._positions_first`).
    """

    def __init__(self, downsample: nn.Module, blocks: list[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = positions_first(self.downsample(x))
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return channels_last(x)


def _conv_norm(in_chans: int, dim: int, suffix: str = "", stride: int = 2, **dd: Any) -> dict[str, nn.Module]:
    conv = nn.Conv2d(in_chans, dim, 3, stride=stride, padding=1, bias=False, **dd)
    return {f"conv{suffix}": conv, f"norm{suffix}": nn.BatchNorm2d(dim, **dd)}


class AttNet(StagedNetwork):
    """AttNet, any input size.

    Args:
        in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate, device, dtype: as in timm.
        dims, depths: widths and numbers of blocks of the four stages.
        mlp_ratios: of each stage; the gated MLP's hidden width is two thirds of that times its width.
        kernel_sizes: of each stage's attentive convolutions.
        mlp_norm: RMS norm inside the gated MLPs.
        layer_scale: a learned factor per channel, 1e-6 at the start, on every branch.

    Differences from the authors' code: two of the linear maps come after what they commute with (see `ATConv`, `GatedMlp`),
    which leaves out 5 to 8 % of the multiplications. Stochastic depth is off unless asked for (theirs: 0 to 0.5).
    """

    truncated = nn.Conv2d, nn.Linear

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 288, 512),
        depths: tuple[int, ...] = (3, 3, 16, 3),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        kernel_sizes: tuple[int, ...] = (3, 3, 3, 3),
        mlp_norm: bool = True,
        layer_scale: bool = True,
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dims[-1]
        drop_path_rates = stochastic_depth(drop_path_rate, depths)

        self.stem = named(
            **_conv_norm(in_chans, dims[0] // 2, "1", **dd), act=nn.GELU(), **_conv_norm(dims[0] // 2, dims[0], "2", **dd))
        self.feature_info, stages = [], []
        strides = downsampling(len(dims), output_stride)
        for i, (dim, kernel_size, ratio, (stride, reduction)) in enumerate(zip(dims, kernel_sizes, mlp_ratios, strides, strict=True)):
            downsample = named(**_conv_norm(dims[i - 1], dim, stride=stride, **dd)) if i else nn.Identity()
            blocks = [Block(dim, kernel_size, ratio, mlp_norm, layer_scale, rate, **dd) for rate in drop_path_rates[i]]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.head = NormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=partial(LayerNorm2d, eps=1e-5), **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".difference_control")}

    def drop_norm(self) -> None:
        self.head.norm = nn.Identity()


_RENAMES = [  # the authors' names → ours
    (r"^downsample_layers\.0\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.0\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.2\.0\.", "stem.conv2."),
    (r"^downsample_layers\.0\.2\.1\.", "stem.norm2."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.token_mixer\.", ".attn."),
    (r"\.channel_mixer\.norm_layer\.", ".mlp.norm."),
    (r"\.channel_mixer\.", ".mlp."),
    (r"\.layer_scale_([12])\.", r".ls\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours, for their models and for a single layer."""
    return {renamed(name, _RENAMES): value for name, value in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.conv1", classifier="head.fc",
        paper_ids="arXiv:2510.20092",
        paper_name="Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
        license="mit", origin_url="https://github.com/price112/Attentive-Convolution", **kwargs,
    )


default_cfgs = generate_default_cfgs({
    "attnet_nano.untrained": _cfg(),
    "attnet_xxs.in1k": _cfg(),
    "attnet_xs.in1k": _cfg(),
    "attnet_s.in1k": _cfg(),
    "attnet_t1.in1k": _cfg(),
    "attnet_t2.in1k": _cfg(),
    "attnet_t3.in1k": _cfg(),
    "attnet_t4.in1k": _cfg(),
})


def _attnet(variant: str, pretrained: bool, **kwargs: Any) -> AttNet:
    return build_model_with_cfg(
        AttNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs,
    )


@register_model
def attnet_nano(pretrained: bool = False, **kwargs: Any) -> AttNet:
    """For small images and machines; not in the paper."""
    args = dict(dims=(24, 48, 96, 160), depths=(1, 1, 3, 1), mlp_ratios=(4, 4, 4, 4), mlp_norm=False, layer_scale=False)
    return _attnet("attnet_nano", pretrained, **dict(args, **kwargs))


@register_model
def attnet_xxs(pretrained: bool = False, **kwargs: Any) -> AttNet:
    args = dict(dims=(32, 64, 128, 240), depths=(2, 2, 4, 2), mlp_norm=False, layer_scale=False)
    return _attnet("attnet_xxs", pretrained, **dict(args, **kwargs))


@register_model
def attnet_xs(pretrained: bool = False, **kwargs: Any) -> AttNet:
    args = dict(dims=(40, 80, 160, 320), depths=(2, 2, 7, 2), mlp_norm=False)
    return _attnet("attnet_xs", pretrained, **dict(args, **kwargs))


@register_model
def attnet_s(pretrained: bool = False, **kwargs: Any) -> AttNet:
    args = dict(dims=(40, 80, 160, 320), depths=(2, 3, 10, 3), mlp_norm=False, layer_scale=False)
    return _attnet("attnet_s", pretrained, **dict(args, **kwargs))


@register_model
def attnet_t1(pretrained: bool = False, **kwargs: Any) -> AttNet:
    return _attnet("attnet_t1", pretrained, **dict(dict(dims=(48, 96, 224, 384), depths=(2, 3, 12, 3)), **kwargs))


@register_model
def attnet_t2(pretrained: bool = False, **kwargs: Any) -> AttNet:
    return _attnet("attnet_t2", pretrained, **dict(dict(dims=(64, 128, 288, 512), depths=(3, 3, 16, 3)), **kwargs))


@register_model
def attnet_t3(pretrained: bool = False, **kwargs: Any) -> AttNet:
    return _attnet("attnet_t3", pretrained, **dict(dict(dims=(72, 144, 320, 576), depths=(4, 4, 26, 4)), **kwargs))


@register_model
def attnet_t4(pretrained: bool = False, **kwargs: Any) -> AttNet:
    return _attnet("attnet_t4", pretrained, **dict(dict(dims=(96, 192, 384, 768), depths=(5, 5, 28, 5)), **kwargs))
