"""DeiT (arXiv 2012.12877) with context broadcasting at the end of every MLP (arXiv 2210.08457).

The weights of timm's DeiT of the same name without `_cb` or `_cbs` load as they are.
"""
from functools import partial
from typing import Any, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp
from timm.models import generate_default_cfgs, register_model
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from zoo.layers import ContextBroadcast
from zoo.models.any_size import AnySizeVisionTransformer
from zoo.models.building import build_model_with_cfg

__all__ = ["BroadcastingMlp", "BroadcastingVisionTransformer", "checkpoint_filter_fn"]

MECHANISM = "broadcast"
HIERARCHICAL = False  # no encoder of U-Nets


class BroadcastingMlp(Mlp):
    """timm's MLP of vision transformers, then `ContextBroadcast`."""

    def __init__(self, in_features: int, scaled: bool = False, **kwargs: Any):
        super().__init__(in_features, **kwargs)
        self.broadcast = ContextBroadcast(in_features, scaled, kwargs.get("device"), kwargs.get("dtype"))

    def forward(self, x: Tensor) -> Tensor:
        return self.broadcast(super().forward(x))


class BroadcastingVisionTransformer(AnySizeVisionTransformer):
    """`AnySizeVisionTransformer` with `BroadcastingMlp`. The mean is over all tokens, that of the class included.

    Args:
        scaled: CB_S instead of CB, see `ContextBroadcast`.
        kwargs: of timm's.
    """

    def __init__(self, scaled: bool = False, **kwargs: Any):
        mlp = partial(BroadcastingMlp, scaled=scaled)
        super().__init__(mlp_layer=mlp, **kwargs)  # pyright: ignore[reportArgumentType]  # timm only calls it


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's conversion; factors of CB_S that the checkpoint does not have stay what they are."""
    scales = {name: value for name, value in model.state_dict().items() if name.endswith(".broadcast.scale")}
    return scales | vit.checkpoint_filter_fn(state_dict, cast(vit.VisionTransformer, model))


def _cfg() -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=None, crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="patch_embed.proj", classifier="head",
        paper_ids="arXiv:2210.08457", paper_name="Scratching Visual Transformer's Back with Uniform Attention",
    )


default_cfgs = generate_default_cfgs({
    "deit_nano_patch16_224_cb.untrained": _cfg(),
    "deit_tiny_patch16_224_cb.untrained": _cfg(),
    "deit_small_patch16_224_cb.untrained": _cfg(),
    "deit_base_patch16_224_cb.untrained": _cfg(),
    "deit_tiny_patch16_224_cbs.untrained": _cfg(),
    "deit_small_patch16_224_cbs.untrained": _cfg(),
    "deit_base_patch16_224_cbs.untrained": _cfg(),
})


def _deit(variant: str, pretrained: bool, depth: int = 12, **kwargs: Any) -> BroadcastingVisionTransformer:
    return build_model_with_cfg(
        BroadcastingVisionTransformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(depth)), feature_cls="getter"), depth=depth, **kwargs,
    )


@register_model
def deit_nano_patch16_224_cb(pretrained: bool = False, **kwargs: Any) -> BroadcastingVisionTransformer:
    """For small images and machines; not in the paper."""
    return _deit("deit_nano_patch16_224_cb", pretrained, **dict(dict(embed_dim=96, depth=4, num_heads=3), **kwargs))


@register_model
def deit_tiny_patch16_224_cb(pretrained: bool = False, **kwargs: Any) -> BroadcastingVisionTransformer:
    return _deit("deit_tiny_patch16_224_cb", pretrained, **dict(dict(embed_dim=192, num_heads=3), **kwargs))


@register_model
def deit_small_patch16_224_cb(pretrained: bool = False, **kwargs: Any) -> BroadcastingVisionTransformer:
    return _deit("deit_small_patch16_224_cb", pretrained, **dict(dict(embed_dim=384, num_heads=6), **kwargs))


@register_model
def deit_base_patch16_224_cb(pretrained: bool = False, **kwargs: Any) -> BroadcastingVisionTransformer:
    return _deit("deit_base_patch16_224_cb", pretrained, **dict(dict(embed_dim=768, num_heads=12), **kwargs))


@register_model
def deit_tiny_patch16_224_cbs(pretrained: bool = False, **kwargs: Any) -> BroadcastingVisionTransformer:
    return _deit("deit_tiny_patch16_224_cbs", pretrained, **dict(dict(embed_dim=192, num_heads=3, scaled=True), **kwargs))


@register_model
def deit_small_patch16_224_cbs(pretrained: bool = False, **kwargs: Any) -> BroadcastingVisionTransformer:
    return _deit("deit_small_patch16_224_cbs", pretrained, **dict(dict(embed_dim=384, num_heads=6, scaled=True), **kwargs))


@register_model
def deit_base_patch16_224_cbs(pretrained: bool = False, **kwargs: Any) -> BroadcastingVisionTransformer:
    return _deit("deit_base_patch16_224_cbs", pretrained, **dict(dict(embed_dim=768, num_heads=12, scaled=True), **kwargs))
