"""iFAM, two vision transformers in a row, of which the second sees what the first found to be of a part (arXiv 2506.08915).

The authors' networks (https://github.com/ananthu-aniraj/ifam) start from DINOv2, at 518 pixels, or 224 for ImageNet, and have no
released weights:

    vit = timm.create_model("vit_base_patch14_reg4_dinov2", pretrained=True, img_size=224)
    model = zoo.ifam.TwoStageVisionTransformer(vit, copy.deepcopy(vit), num_classes=200)
"""
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Format, PatchEmbed, get_device_dtype, global_pool_nlc
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models import vision_transformer as vit
from timm.models._features import feature_take_indices  # private, and the only source of it: timm's own families use it
from torch import Tensor, nn

from zoo.layers import PartDiscovery
from zoo.layers._capture import report
from zoo.layers._scripting import refuse_scripting
from zoo.layers.part_discovery import Parts
from zoo.models.any_size import AnySizeVisionTransformer
from zoo.models.building import build_model_with_cfg

__all__ = ["TwoStageVisionTransformer", "checkpoint_filter_fn"]

MECHANISM = "parts"
HIERARCHICAL = False  # no encoder of U-Nets
MASKS = ("hard", "straight_through", "soft")
POOLS = ("", "token", "avg", "max", "avgmax")
LEAST = 1e-10  # of a soft mask


class TwoStageVisionTransformer(nn.Module):
    """Two of timm's vision transformers: the first finds parts, the second classifies the patches that belong to any (iFAM).

        parts  = PartDiscovery(tokens of stage 1's patches)
        tokens = stage 2(image), where all queries see prefix tokens and the patches of parts.mask only, in every block
        logits = head(LayerNorm(class token))
        part logits = mean_k part_head(features_k), k of the parts without the background

    Images (B, C, H, W) → logits (B, classes). Part logits are what stage 1 is trained by, see `zoo.PartDiscoveryLoss`; they and what
    `zoo.layers.PartDiscovery` finds come from `discover`, and from `zoo.capture`: `part_logits` of the network, `maps`, `mask` and
    `soft_mask` of its child `parts`. `forward_features` gives stage 2's tokens, in which masked patches are 0; `global_pool` other than
    "token" pools these, zeros included.

    Args:
        stage_1, stage_2: vision transformers, which become part of this network, without heads. A class token is asked of the second. Both
            have patches of one size; those of timm's plain class take any image size from here on.
        num_classes: 0 for no heads.
        num_parts: K, beside the background.
        mask: "hard", as in the paper: no gradient of stage 2's loss gets to stage 1. "straight_through": in training, ln(mask + 1e-10) is
            added to the logits of attention, with the mask of the gradient that `PartDiscovery` says: outputs are those of "hard"
            but for a weight of 1e-10 for masked patches, and stage 1 learns from stage 2. "soft": the same of the soft mask, always.
        noise, noisy_maps, mask_drop_rate: of `PartDiscovery`.
        part_drop_rate: in training, parts whose features are dropped before their head.
        drop_rate: of dropout before the head.
        drop_masked: in evaluation, whether stage 2 runs without masked patches, with as many of each image as the fullest of the batch has
            left, which gives the same outputs. Not for networks that are traced, compiled or exported, as sizes hang on values.
        global_pool: "token", "avg", "max", "avgmax", or "": the map of all patches, (B, C, H, W).

    Differences from the authors' code (ananthu-aniraj/ifam, models/two_stage_double_classification.py): theirs is "hard" or "soft", with
    noise in evaluation, too (`noise="always"`), and drops masked patches in evaluation.

    Raises:
        ValueError: at construction, for what is not allowed above.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self, stage_1: vit.VisionTransformer, stage_2: vit.VisionTransformer, num_classes: int = 1000, num_parts: int = 8,
        mask: str = "hard", noise: str = "training", noisy_maps: bool = True, mask_drop_rate: float = 0.3, part_drop_rate: float = 0.3,
        drop_rate: float = 0.0, drop_masked: bool = False, global_pool: str = "token",
    ):
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
        if drop_masked and mask == "soft":
            raise ValueError("drop_masked needs a mask that hides patches, which mask='soft' does not")
        _check_stages(stage_1, stage_2)
        dd: dict[str, Any] = get_device_dtype(stage_2)
        self.stage_1, self.stage_2 = (_headless(stage) for stage in (stage_1, stage_2))
        self.mask, self.drop_masked, self.part_drop_rate = mask, drop_masked, part_drop_rate
        self.take_parts: Callable[[Parts, Tensor], None] | None = None  # of a loss, while it runs the network
        self.in_chans = cast(int, stage_2.in_chans)
        self.embed_dim = self.num_features = self.head_hidden_size = cast(int, stage_2.embed_dim)
        self.num_prefix_tokens, self.has_class_token = stage_2.num_prefix_tokens, True
        self.feature_info = [{**info, "module": f"stage_2.{info['module']}"} for info in stage_2.feature_info]
        self.parts = PartDiscovery(cast(int, stage_1.embed_dim), num_parts, noise, noisy_maps, mask_drop_rate, **dd)
        self.fc_norm = nn.LayerNorm(self.embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @property
    def cls_token(self) -> nn.Parameter | None:
        return self.stage_2.cls_token

    def init_weights(self, needs_reset: bool = True) -> None:
        """Values of a new network: timm's of vision transformers, torch's of linear layers; prototypes as theirs of a convolution."""
        for stage in (self.stage_1, self.stage_2):
            stage.init_weights(needs_reset=needs_reset)
        for module in (self.parts, self.parts.modulation, self.fc_norm, self.head, self.part_head):
            if needs_reset and hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()

    def no_weight_decay(self) -> set[str]:
        kept = {f"{stage}.{name}" for stage in ("stage_1", "stage_2") for name in getattr(self, stage).no_weight_decay()}
        return kept & {name for name, _ in self.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The blocks of either stage count from the first one."""
        return dict(stem=r"^stage_[12]\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)",
                    blocks=[(r"^stage_[12]\.blocks\.(\d+)", None), (r"^stage_[12]\.norm\.|^parts|^part_head|^fc_norm", (99999,))])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in (self.stage_1, self.stage_2):
            stage.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        for stage in (self.stage_1, self.stage_2):
            stage.set_input_size(img_size=img_size, patch_size=patch_size)

    def freeze_first(self) -> None:
        """Of stage 1's transformer only its class and register tokens and positions learn from here on, as in the authors' recipe."""
        for name, parameter in self.stage_1.named_parameters():
            parameter.requires_grad_(name in ("cls_token", "reg_token", "pos_embed"))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads of both stages."""
        if global_pool is not None and global_pool not in POOLS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {global_pool!r}")
        dd: dict[str, Any] = get_device_dtype(self.fc_norm)
        self.num_classes, self.global_pool = num_classes, self.global_pool if global_pool is None else global_pool
        self.head, self.part_head = (
            nn.Linear(dim, num_classes, bias=False, **dd).train(self.training) if num_classes else nn.Identity()
            for dim in (self.embed_dim, self.parts.dim))

    def discover(self, x: Tensor) -> tuple[Parts, Tensor]:
        """Stage 1 of images: what it found, and the part logits (B, classes)."""
        tokens, size = _embedded(self.stage_1, x)
        patches = _through(self.stage_1, tokens)[:, self.stage_1.num_prefix_tokens :]
        parts = self.parts(self.stage_1.norm(patches).unflatten(1, size))
        logits = self.part_head(F.dropout1d(parts.features[:, :-1], self.part_drop_rate, self.training)).mean(1)
        report(self, part_logits=logits)
        if self.take_parts is not None:
            self.take_parts(parts, logits)
        return parts, logits

    def forward_features(self, x: Tensor) -> Tensor:
        """Stage 2's tokens (B, prefix + patches, C); those of masked patches are 0."""
        return self._stage_2(x, self.discover(x)[0])[0]

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Stage 2's tokens after the blocks that `indices` picks (the last n, or a list; all by default), as in timm."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stage_2.blocks), indices)
        parts, _ = self.discover(x)
        final, found = self._stage_2(x, parts, taken, last if stop_early else None, norm)
        shaped: list[Any] = []
        for y in found:
            prefix, patches = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
            if output_fmt == "NCHW":
                patches = patches.unflatten(1, parts.mask.shape[1:]).permute(0, 3, 1, 2)
            shaped.append((patches, prefix) if return_prefix_tokens else patches)
        return shaped if intermediates_only else (final, shaped)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drops stage 2's blocks after the last of `indices`, and the norm and heads where asked."""
        taken, last = feature_take_indices(len(self.stage_2.blocks), indices)
        self.stage_2.blocks = self.stage_2.blocks[: last + 1]
        if prune_norm:
            self.stage_2.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = global_pool_nlc(x, self.global_pool, self.num_prefix_tokens)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        parts, _ = self.discover(x)
        out = self.forward_head(self._stage_2(x, parts)[0])
        if self.global_pool:
            return out
        return out[:, self.num_prefix_tokens :].unflatten(1, parts.mask.shape[1:]).permute(0, 3, 1, 2)

    def _stage_2(
        self, x: Tensor, parts: Parts, taken: Sequence[int] = (), last: int | None = None, norm: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Its normed tokens, and those after the blocks `taken`; blocks after the `last` do not run."""
        stage, prefix = self.stage_2, self.num_prefix_tokens
        tokens, _ = _embedded(stage, x)
        soft = self.mask == "soft"
        mask, place = (parts.soft_mask[:, 0] if soft else parts.mask).flatten(1), None
        visible = mask.detach() > 0.5
        if soft or self.mask == "straight_through" and self.training:
            bias = (mask + LEAST).log()
        elif self.drop_masked and not self.training:
            place = visible.int().argsort(dim=1, descending=True, stable=True)[:, : int(visible.sum(1).max())]
            left = tokens[:, prefix:].gather(1, place[..., None].expand(-1, -1, tokens.shape[2]))
            tokens, bias = torch.cat([tokens[:, :prefix], left], 1), _hiding(visible.gather(1, place))
        else:
            bias = _hiding(visible)
        bias = F.pad(bias, (prefix, 0))[:, None, None].to(tokens.dtype)

        def whole(y: Tensor) -> Tensor:
            """With 0 for what is masked."""
            if soft:
                return y
            patches = y[:, prefix:]
            if place is not None:
                empty = patches.new_zeros(len(y), visible.shape[1], y.shape[2])
                patches = empty.scatter(1, place[..., None].expand_as(patches), patches)
            return torch.cat([y[:, :prefix], patches * visible[..., None]], 1)

        found: list[Tensor] = []

        def take(i: int, y: Tensor) -> None:
            if i in taken:
                found.append(whole(stage.norm(y) if norm else y))

        tokens = _through(stage, tokens, bias, last, take)
        return whole(stage.norm(tokens)), found


def _check_stages(*stages: vit.VisionTransformer) -> None:
    for name, stage in zip(("stage_1", "stage_2"), stages, strict=True):
        if not isinstance(stage, vit.VisionTransformer):
            raise ValueError(f"{name} must be one of timm's VisionTransformer, got {type(stage).__name__}")
        if not isinstance(stage.patch_drop, nn.Identity):
            raise ValueError(f"{name} drops patches at random (patch_drop_rate), and no mask of parts would fit what is left")
    first, second = stages
    if first is second:
        raise ValueError("stage_1 and stage_2 must be two networks, got one twice; copy.deepcopy makes another")
    if second.cls_token is None:
        raise ValueError("stage_2 must have a class token, which sees its patches, and has none")
    if first.patch_embed.patch_size != second.patch_embed.patch_size or first.in_chans != second.in_chans:
        found = " and ".join(f"{stage.in_chans} channels in patches of {stage.patch_embed.patch_size}" for stage in stages)
        raise ValueError(f"stage_1 and stage_2 must have patches of one size and as many channels, got {found}")


def _headless(stage: vit.VisionTransformer) -> vit.VisionTransformer:
    """Without its head, its last norm before any pooling, and for images of any size if it is timm's plain class."""
    stage.reset_classifier(0, "")
    if isinstance(stage.norm, nn.Identity):
        stage.norm = stage.fc_norm
    stage.fc_norm = nn.Identity()
    patches = stage.patch_embed
    if type(stage) is vit.VisionTransformer and type(patches) is PatchEmbed:
        stage.__class__ = AnySizeVisionTransformer
        stage.dynamic_img_size = patches.dynamic_img_pad = True
        patches.strict_img_size = patches.flatten = False
        patches.output_fmt = Format.NHWC
    return stage


def _embedded(stage: vit.VisionTransformer, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What the first block gets, and how many patches there are in height and width."""
    patches = stage.patch_embed(x)
    size = (patches.shape[1], patches.shape[2]) if stage.dynamic_img_size else stage.patch_embed.grid_size
    return stage.norm_pre(stage._pos_embed(patches)), cast(tuple[int, int], size)


def _through(
    stage: vit.VisionTransformer, tokens: Tensor, bias: Tensor | None = None, last: int | None = None,
    take: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The tokens after all blocks, or the `last` that runs; `take` gets those after each."""
    mask: dict[str, Any] = {} if bias is None else {"attn_mask": bias}
    for i, block in enumerate(stage.blocks):
        tokens = checkpoint(block, tokens, **mask) if stage.grad_checkpointing else block(tokens, **mask)
        if take is not None:
            take(i, tokens)
        if i == last:
            break
    return tokens


def _hiding(visible: Tensor) -> Tensor:
    """What is added to logits: -∞ for what is not visible. timm takes no boolean masks where attention is spelled out."""
    return torch.where(visible, 0.0, -torch.inf)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names and shapes of the authors' class, and position embeddings of images of another size; a head of parts for other classes
    than the network's is left out for its own, as timm does with the classifier."""
    network = cast(TwoStageVisionTransformer, model)
    names = {"stage_1.fc_landmarks.weight": "parts.prototypes", "stage_1.fc_class_landmarks.": "part_head.",
             "stage_1.modulation.": "parts.modulation.", "stage_2.fc_norm.": "fc_norm.", "stage_2.head.": "head."}
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.endswith("prefix_attn_mask"):
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        converted[name] = value.flatten(1) if name == "parts.prototypes" else value
    for stage in ("stage_1", "stage_2"):
        of_stage = {name.removeprefix(f"{stage}."): converted.pop(name) for name in list(converted) if name.startswith(f"{stage}.")}
        resized = vit.checkpoint_filter_fn(of_stage, getattr(network, stage))
        converted |= {f"{stage}.{name}": value for name, value in cast(dict[str, Tensor], resized).items()}
    own = network.part_head.weight if isinstance(network.part_head, nn.Linear) else None
    if "part_head.weight" in converted and (own is None or own.shape[0] != len(converted["part_head.weight"])):
        del converted["part_head.weight"]
        if own is not None:
            converted["part_head.weight"] = own.detach()
    return converted


def _of_parameters(
    num_classes: int = 1000, global_pool: str = "token", drop_rate: float = 0.0, num_parts: int = 8, mask: str = "hard",
    noise: str = "training", noisy_maps: bool = True, mask_drop_rate: float = 0.3, part_drop_rate: float = 0.3, drop_masked: bool = False,
    **vit_args: Any,
) -> TwoStageVisionTransformer:
    """Of two vision transformers of one size."""
    first, second = (AnySizeVisionTransformer(num_classes=0, **vit_args) for _ in range(2))
    return TwoStageVisionTransformer(
        first, second, num_classes, num_parts, mask, noise, noisy_maps, mask_drop_rate, part_drop_rate, drop_rate, drop_masked, global_pool)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=None, crop_pct=0.875, interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD, first_conv=("stage_1.patch_embed.proj", "stage_2.patch_embed.proj"), classifier="head",
        paper_ids="arXiv:2506.08915", paper_name="Two-stage Vision Transformers and Hard Masking offer Robust Object Representations",
        **kwargs)


default_cfgs = generate_default_cfgs({
    "ifam_nano_patch16_224.untrained": _cfg(),
    "ifam_base_patch14_reg4_dinov2.untrained": {**_cfg(), "input_size": (3, 518, 518), "crop_pct": 1.0},
})


def _ifam(variant: str, pretrained: bool, args: dict[str, Any]) -> TwoStageVisionTransformer:
    return build_model_with_cfg(
        cast(type[TwoStageVisionTransformer], _of_parameters), variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(args.get("depth", 12))), feature_cls="getter"), **args)


@register_model
def ifam_nano_patch16_224(pretrained: bool = False, **kwargs: Any) -> TwoStageVisionTransformer:
    """For small images and machines; not in the paper."""
    return _ifam("ifam_nano_patch16_224", pretrained, dict(dict(embed_dim=96, depth=4, num_heads=3, num_parts=4), **kwargs))


@register_model
def ifam_base_patch14_reg4_dinov2(pretrained: bool = False, **kwargs: Any) -> TwoStageVisionTransformer:
    """Two of DINOv2's base size with registers; `img_size` 224 for ImageNet, in the paper."""
    args = dict(img_size=518, patch_size=14, embed_dim=768, num_heads=12, init_values=1e-5, reg_tokens=4, no_embed_class=True)
    return _ifam("ifam_base_patch14_reg4_dinov2", pretrained, dict(args, **kwargs))
