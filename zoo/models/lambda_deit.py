"""λ-ViT: DeiT (arXiv 2012.12877) without the attention of some blocks (arXiv 2404.05657).

The names end in the blocks, counted from 0, that have none.
"""
import re
from collections.abc import Iterable
from typing import Any, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.layers.attention_removal import has_attention, remove_attention_of
from zoo.models.any_size import AnySizeVisionTransformer
from zoo.models.building import build_model_with_cfg

__all__ = ["LambdaVisionTransformer", "checkpoint_filter_fn"]

MECHANISM = "removal"
HIERARCHICAL = False  # no encoder of U-Nets
REPORTED_IN = "the authors' README, with torch 1.12.1"
REPORTED_TOP1 = {
    "lambda_deit_tiny_024": 72.79, "lambda_deit_tiny_0246": 71.88, "lambda_deit_small_024": 80.33, "lambda_deit_small_0246": 79.89,
    "lambda_deit_base_01346": 81.77, "lambda_deit_base_013469": 81.46,
}


class LambdaVisionTransformer(AnySizeVisionTransformer):
    """`AnySizeVisionTransformer` whose attention is gone from some blocks: x ← 2x; x ← x + MLP(norm(x)) is what is left of them.

    Args:
        removed: which blocks, counted from 0. `zoo.remove_attention` does the same to a model that is built.
        kwargs: of timm's.

    Raises ValueError for a block that there is not.
    """

    def __init__(self, removed: Iterable[int] = (), **kwargs: Any):
        super().__init__(**kwargs)
        for place in (removed := tuple(removed)):
            if not 0 <= place < len(self.blocks):
                raise ValueError(f"removed must be blocks from 0 to {len(self.blocks) - 1}, got {removed}")
            remove_attention_of(self.blocks[place])


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's conversion, without the attention of the blocks that have none, and the norms before it.

    The authors' files hold them as they were when λ had come to 0 (sihaoevery/lambda_vit, main_lambda.py).

    Raises InputError for files of `zoo.remove_attention` that still have a share of that attention.
    """
    transformer = cast(vit.VisionTransformer, model)
    converted = vit.checkpoint_filter_fn(state_dict, transformer)
    gone = [place for place, block in enumerate(transformer.blocks) if not has_attention(block)]
    for place in gone:
        if share := float(converted.get(f"blocks.{place}.attention_share", 0)):
            raise InputError(f"the weights still have a share of {share:g} of the attention in block {place}, and the model has none of "
                             "it; take those from the end of training")
    pattern = re.compile(rf"blocks\.({'|'.join(map(str, gone))})\.(norm1\.|attn\.|attention_share$)")
    return {name: value for name, value in converted.items() if not pattern.match(name)}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=None, crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="patch_embed.proj", classifier="head",
        paper_ids="arXiv:2404.05657", paper_name="MLP Can Be A Good Transformer Learner", **kwargs,
    )


_RELEASED = dict(origin_url="https://github.com/sihaoevery/lambda_vit", license="bsd-2-clause")
default_cfgs = generate_default_cfgs({
    "lambda_deit_nano_02.untrained": _cfg(),
    "lambda_deit_tiny_024.in1k": _cfg(**_RELEASED),
    "lambda_deit_tiny_0246.in1k": _cfg(**_RELEASED),
    "lambda_deit_small_024.in1k": _cfg(**_RELEASED),
    "lambda_deit_small_0246.in1k": _cfg(**_RELEASED),
    "lambda_deit_base_01346.in1k": _cfg(**_RELEASED),
    "lambda_deit_base_013469.in1k": _cfg(**_RELEASED),
})


_SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(embed_dim=96, depth=4, num_heads=3), "tiny": dict(embed_dim=192, num_heads=3), "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}


def _deit(size: str, removed: tuple[int, ...], pretrained: bool, kwargs: dict[str, Any]) -> LambdaVisionTransformer:
    args = dict(dict(_SIZES[size], removed=removed), **kwargs)
    return build_model_with_cfg(
        LambdaVisionTransformer, f"lambda_deit_{size}_{''.join(map(str, removed))}", pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(args.get("depth", 12))), feature_cls="getter"), **args,
    )


@register_model
def lambda_deit_nano_02(pretrained: bool = False, **kwargs: Any) -> LambdaVisionTransformer:
    """For small images and machines; not in the paper."""
    return _deit("nano", (0, 2), pretrained, kwargs)


@register_model
def lambda_deit_tiny_024(pretrained: bool = False, **kwargs: Any) -> LambdaVisionTransformer:
    return _deit("tiny", (0, 2, 4), pretrained, kwargs)


@register_model
def lambda_deit_tiny_0246(pretrained: bool = False, **kwargs: Any) -> LambdaVisionTransformer:
    return _deit("tiny", (0, 2, 4, 6), pretrained, kwargs)


@register_model
def lambda_deit_small_024(pretrained: bool = False, **kwargs: Any) -> LambdaVisionTransformer:
    return _deit("small", (0, 2, 4), pretrained, kwargs)


@register_model
def lambda_deit_small_0246(pretrained: bool = False, **kwargs: Any) -> LambdaVisionTransformer:
    return _deit("small", (0, 2, 4, 6), pretrained, kwargs)


@register_model
def lambda_deit_base_01346(pretrained: bool = False, **kwargs: Any) -> LambdaVisionTransformer:
    return _deit("base", (0, 1, 3, 4, 6), pretrained, kwargs)


@register_model
def lambda_deit_base_013469(pretrained: bool = False, **kwargs: Any) -> LambdaVisionTransformer:
    return _deit("base", (0, 1, 3, 4, 6, 9), pretrained, kwargs)
