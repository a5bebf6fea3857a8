"""SUM (Saliency Unification through Mamba, arXiv 2406.17815): where people look, in pictures of several kinds.

The authors' checkpoint (MIT licence; https://github.com/Arhosseini77/SUM, huggingface safe-models/SUM) loads as it is:

    timm.create_model("sum", pretrained=True, pretrained_cfg_overlay=dict(file="model.safetensors"))

Training starts from VMamba's weights: `model.load_encoder("vssmsmall_dp03_ckpt_epoch_238.pth")`.
"""
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype, register_notrace_function
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.kernels._backends import in_functorch
from zoo.kernels._exporting import is_exporting
from zoo.layers._linear import linear
from zoo.layers._spatial import crop, pad_to_multiple
from zoo.layers._tracing import notrace_module
from zoo.layers.selective_scan_2d import MODULATION
from zoo.models import vmamba
from zoo.models.building import build_model_with_cfg
from zoo.models.conversion import renamed
from zoo.models.looking import FixationNetwork, checked
from zoo.models.staged import reset_parameters, stochastic_depth, truncated_normal_
from zoo.models.vmamba import UNDECAYED, Stage, VMamba, VSSBlock
from zoo.weights import load_weights

__all__ = ["ConditionalVSSBlock", "PatchExpand", "SUM", "checkpoint_filter_fn"]

MECHANISM = "sum"
HIERARCHICAL = False  # no encoder of U-Nets
DENSE = True
TASK = "fixations"
StateDict = dict[str, Tensor]
CONDITIONS = ("natural, by mouse", "natural, by eye", "e-commerce", "user interface")
WIDTHS = (128, 128, 64, len(MODULATION))  # from a condition's vector to its five numbers
Condition = int | Tensor | None


class ConditionalVSSBlock(VSSBlock):
    """A `VSSBlock` whose scan is modulated by what kind of picture it is (section 3.2: C-VSS); NHWC → NHWC.

    The five numbers of `SelectiveScan2d` are mlp(condition)ᵢ, with a learned vector of 128 numbers for each kind i and a perceptron
    128 → 128 → 64 → 5 with GELU.

    Args:
        dim, state_dim, eps, drop_path: as of `VSSBlock`.
        conditions: how many kinds there are.
    """

    def __init__(self, dim: int, state_dim: int = 16, eps: float = 1e-5, drop_path: float = 0.0, conditions: int = len(CONDITIONS),
                 **dd: Any):
        super().__init__(dim, state_dim, eps, drop_path, **dd)
        self.condition = nn.Parameter(torch.empty(conditions, WIDTHS[0], **dd))
        first, second, third = (nn.Linear(width, out, **dd) for width, out in zip(WIDTHS, WIDTHS[1:], strict=False))
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.condition)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`kind` (B,), or (1,) for all pictures, int64."""
        modulation = F.embedding(kind, self.mlp(self.condition))
        return x + self.drop_path(self.attn(self.norm(x), modulation))


@notrace_module
class PatchExpand(nn.Module):
    """Every position becomes `scale` × `scale`: (B, H, W, dim) → (B, scale H, scale W, dim / scale).

    A linear layer to `scale` times the channels, which are cut as [down, right, channel], and a LayerNorm.
    """

    def __init__(self, dim: int, scale: int = 2, **dd: Any):
        super().__init__()
        self.scale = scale
        self.expand, self.norm = nn.Linear(dim, scale * dim, bias=False, **dd), nn.LayerNorm(dim // scale, **dd)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        s = self.scale
        x = linear(self.expand, x).reshape(batch, height, width, s, s, dim // s).transpose(2, 3)
        return self.norm(x.reshape(batch, s * height, s * width, dim // s))


class DecoderStage(nn.Module):
    """Expansion, or nothing in the first stage, and conditional blocks; NHWC → NHWC."""

    def __init__(self, upsample: nn.Module, blocks: list[ConditionalVSSBlock]):
        super().__init__()
        self.upsample, self.blocks = upsample, nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        x = self.upsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, kind) if self.grad_checkpointing else block(x, kind)
        return x


class Encoder(VMamba):
    """VMamba without its last norm and head: image → the last stage's map and what the blocks of each stage are given, (B, H, W, C)."""

    def __init__(self, in_chans: int, **args: Any):
        super().__init__(in_chans, 0, "", **args)
        self.drop_norm()
        self.made = dict(args, in_chans=in_chans)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, given = self.stem(x), []
        for stage in self.stages:
            given.append(cast(Stage, stage).entered(x))
            x = cast(Stage, stage).scanned(given[-1]).permute(0, 3, 1, 2)
        return x.permute(0, 2, 3, 1), given

    def load_weights(self, file: str) -> None:
        """Takes the weights of a VMamba of these sizes in a file, as `zoo.weights.load_weights` reads it; its norm and head are left."""
        whole = VMamba(**{**self.made, **get_device_dtype(self)})
        cast(Any, whole).pretrained_cfg = dict(classifier=("norm", "head.fc"))
        load_weights(whole, file, filter_fn=vmamba.checkpoint_filter_fn, new_head=True)
        self.load_state_dict({name: value for name, value in whole.state_dict().items() if name in self.state_dict()})


class SUM(FixationNetwork):
    """Where people look in pictures of a kind: image (B, in_chans, H, W) → map (B, 1, H, W) from 0 to 1, of any size.

    VMamba's stages; a decoder of as many, whose blocks know the kind of picture: what enters a stage of the encoder is added to what
    enters the one of the decoder that expands to the next finer size (so what enters the first is used by none); the last expansion is
    fourfold; a 1×1 convolution, and a sigmoid. `SUM.logits` gives the map before it.

    Kinds, by the authors' weights: 0 natural scenes whose looks were collected by mouse (SALICON), 1 natural scenes by eye trackers, 2
    pages of shops, 3 user interfaces. Sizes that 32 does not divide are padded at the ends with the last row and column, and the map is
    cut; the authors resize pictures to 256×256, which is what their weights have seen.

    Args:
        in_chans: channels of the image.
        num_classes: 1.
        condition: the kind of the pictures that are given without one.
        conditions: how many kinds there are.
        dims, depths: widths and numbers of blocks of the encoder's stages, finest first.
        decoder_depths: numbers of blocks of the decoder's, coarsest first.
        state_dim: of `SelectiveScan2d`.
        drop_path_rate: growing with depth from 0 to it in the encoder, and falling from it to 0 in the decoder (theirs: 0.3).

    Differences from the authors' code (Arhosseini77/SUM, net/models): any size, and any number of kinds and stages; kinds are numbers or
    one-hot, and need not be given.

    Raises:
        ValueError, TypeError: arguments outside what is said above, at construction; an input or a kind of another shape, in `forward`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        condition: int = 0,
        conditions: int = len(CONDITIONS),
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 27, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        state_dim: int = 16,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_classes)
        if conditions < 1:
            raise ValueError(f"conditions must be at least 1, got {conditions}")
        if not len(dims) == len(depths) == len(decoder_depths):
            raise ValueError(f"dims, depths and decoder_depths must be of the same stages, got {tuple(dims)}, {tuple(depths)} and "
                             f"{tuple(decoder_depths)}")
        if any(fine * 2 != coarse for fine, coarse in zip(dims, dims[1:], strict=False)) or dims[0] % 4:
            raise ValueError(f"dims must begin with a multiple of 4 and double, got {tuple(dims)}")
        self.condition, self.conditions = known_kind(condition, conditions), conditions
        self.in_chans, self.reduction = in_chans, vmamba.PATCH * 2 ** (len(dims) - 1)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.encoder = Encoder(in_chans, dims=dims, depths=depths, state_dim=state_dim, drop_path_rate=drop_path_rate, **dd)
        falling = stochastic_depth(drop_path_rate, decoder_depths[::-1])[::-1]
        decoder = []
        for i, (dim, rates) in enumerate(zip(dims[::-1], falling, strict=True)):
            blocks = [ConditionalVSSBlock(dim, state_dim, drop_path=rate, conditions=conditions, **dd) for rate in rates[::-1]]
            decoder.append(DecoderStage(PatchExpand(2 * dim, **dd) if i else nn.Identity(), blocks))
        self.decoder = nn.ModuleList(decoder)
        self.final_up = PatchExpand(dims[0], vmamba.PATCH, **dd)
        self.num_features = self.head_hidden_size = dims[0] // vmamba.PATCH
        self.head = nn.Conv2d(self.num_features, 1, 1, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Values of a new network, as in timm; `needs_reset` also for what modules give themselves when they are made."""
        if needs_reset:
            reset_parameters(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                truncated_normal_(module)

    def load_encoder(self, file: str) -> None:
        """Takes VMamba's weights in a file for the encoder, and for those blocks of the decoder that mirror one of its blocks.

        As in the authors' code (net/models/SUM.py: load_from): block j of the decoder's stage that works at the size of a stage of the
        encoder takes what that one's block j has, but for the merging, the kinds and their perceptron.
        """
        self.encoder.load_weights(file)
        own, stages = self.state_dict(), len(self.decoder)
        given = {}
        for name, value in self.encoder.state_dict().items():
            kind, stage, rest = (*name.split(".", 2), "", "")[:3]
            mirror = f"decoder.{stages - 1 - int(stage)}.{rest}" if kind == "stages" and rest.startswith("blocks.") else ""
            if mirror in own:
                given[mirror] = value
        self.load_state_dict(given, strict=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.encoder.set_grad_checkpointing(enable)
        for stage in self.decoder:
            cast(DecoderStage, stage).grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(UNDECAYED)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stages = [(r"^encoder\.stages\.(\d+)", None), (r"^decoder\.(\d+)", None), (r"^final_up", (99999,))]
        fine = [(r"^encoder\.stages\.(\d+)\.downsample", (0,)), (r"^encoder\.stages\.(\d+)\.blocks\.(\d+)", None), *stages[1:]]
        return dict(stem=r"^encoder\.stem", blocks=stages if coarse else fine)

    def forward_features(self, x: Tensor, condition: Condition = None) -> Tensor:
        """(B, dims[0] / 4, H, W), of an image whose sizes 32 divides."""
        kind = chosen(condition, self.condition, self.conditions, x)
        x, given = self.encoder(x)
        for i, stage in enumerate(self.decoder):
            x = stage(x + given[-i] if i else x, kind)
        return self.final_up(x).permute(0, 3, 1, 2)

    def logits(self, x: Tensor, condition: Condition = None) -> Tensor:
        """The map before the sigmoid, (B, 1, H, W)."""
        x = checked(x, self.in_chans, "SUM")
        out = self.head(self.forward_features(pad_to_multiple(x, self.reduction, "replicate"), condition))
        return crop(out, x.shape[2:], by_index=True)

    def forward(self, x: Tensor, condition: Condition = None) -> Tensor:
        """`condition`: the kind of all pictures, or of each: (B,) int64, or one-hot (B, conditions). Default: the constructor's."""
        return self.logits(x, condition).sigmoid()


def known_kind(kind: int, conditions: int) -> int:
    """The kind, unless there is no such."""
    if isinstance(kind, bool) or not isinstance(kind, int):
        raise TypeError(f"condition must be a whole number or a tensor, got {kind!r}")
    if not 0 <= kind < conditions:
        raise ValueError(f"condition must be 0 to {conditions - 1}, got {kind}")
    return kind


@register_notrace_function
def chosen(condition: Condition, default: int, conditions: int, x: Tensor) -> Tensor:
    """The kinds of pictures x as (B,) or, where it is one for all, (1,), int64."""
    if not isinstance(condition, Tensor):
        return torch.full((1,), known_kind(default if condition is None else condition, conditions), device=x.device)
    if condition.ndim == 2 and condition.shape[1] == conditions:
        return condition.argmax(1)
    if condition.ndim != 1:
        raise ValueError(f"condition must be (B,) or one-hot (B, {conditions}), got shape {tuple(condition.shape)}")
    if condition.dtype != torch.int64:
        raise TypeError(f"condition must be of int64, or one-hot, got {condition.dtype}")
    asked = condition.device.type == "cpu" and not (torch.compiler.is_compiling() or is_exporting() or in_functorch())
    if asked and ((condition < 0) | (condition >= conditions)).any():
        raise ValueError(f"condition must be 0 to {conditions - 1}, got {condition.tolist()}")
    return condition


_RENAMES = [  # the authors' names → ours
    (r"^salu_mamba\.", ""),
    (r"(^|\.)ln_1\.", r"\1norm."),
    (r"(^|\.)self_attention\.", r"\1attn."),
    (r"^patch_embed\.", "encoder.stem."),
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"encoder.stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.", r"encoder.stages.\1."),
    (r"^layers_up\.(\d+)\.", r"decoder.\1."),
    (r"^final_conv\.", "head."),
]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The authors' names → ours, for the network and for a single block."""
    return {renamed(name, _RENAMES): value for name, value in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1, input_size=(3, 256, 256), mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, interpolation="bilinear",
        crop_pct=1.0, first_conv="encoder.stem.proj", classifier=None, license="mit", origin_url="https://github.com/Arhosseini77/SUM",
        paper_ids="arXiv:2406.17815", paper_name="SUM: Saliency Unification through Mamba for Visual Attention Modeling") | kwargs


default_cfgs = generate_default_cfgs({
    "sum.unified": _cfg(),
    "sum_nano.untrained": _cfg(input_size=(3, 96, 128)),
})


def _sum(variant: str, pretrained: bool, **kwargs: Any) -> SUM:
    if kwargs.get("features_only"):
        raise RuntimeError(f"features_only is not implemented for {variant}: it gives a map of the input's size")
    return build_model_with_cfg(SUM, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def sum_nano(pretrained: bool = False, **kwargs: Any) -> SUM:
    """For small images and machines; not in the paper."""
    args = dict(dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1), state_dim=4)
    return _sum("sum_nano", pretrained, **dict(args, **kwargs))


@register_model
def sum(pretrained: bool = False, **kwargs: Any) -> SUM:  # by the name of the paper; nothing is added up here
    """The authors' network, on VMamba-S."""
    return _sum("sum", pretrained, **kwargs)
