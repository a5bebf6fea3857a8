"""ViDAT, vision transformers of dual attention (arXiv 2405.16727): heads of self-attention beside relational heads.

The authors' networks (https://github.com/Awni00/dual-attention, release 0.0.7 on PyPI, dual_attention/vision_models.py) have no sizes of
their own and no released weights; files of their class load.
"""
from typing import Any, cast

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GELUTanh, PatchEmbed, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from zoo.layers import DualAttention, SymbolicAttention
from zoo.models.any_size import AnySizeVisionTransformer
from zoo.models.building import build_model_with_cfg
from zoo.models.staged import reset_parameters

__all__ = ["VisionDualAttentionTransformer", "checkpoint_filter_fn"]

MECHANISM = "dual"
HIERARCHICAL = False  # no encoder of U-Nets


class NormedPatchEmbed(PatchEmbed):
    """timm's patch embedding of patches that are normalised first, each with all its numbers, by `norm_in`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.norm_in = nn.LayerNorm(self.proj.weight.shape[1:], device=kwargs.get("device"), dtype=kwargs.get("dtype"))

    def forward(self, x: Tensor) -> Tensor:
        height, width = cast(tuple[int, int], self.patch_size)
        x = F.pad(x, (0, (width - x.shape[3] % width) % width, 0, (height - x.shape[2] % height) % height))
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        normed = self.norm_in(patches.flatten(1, 2)).unflatten(1, patches.shape[1:3])
        return super().forward(normed.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        if patch_size is not None and to_2tuple(patch_size) != tuple(self.patch_size):
            raise ValueError(f"patch_size stays {self.patch_size}, for which patches are normalised, got {patch_size}")
        super().set_input_size(img_size=img_size)


class DualAttentionBlock(vit.Block):
    """x + attention(norm(x), symbols(x)), then x + MLP(norm(x)); `retrieve` holds what makes symbols, which all blocks share."""

    retrieve: tuple[SymbolicAttention]  # in a tuple: it is the network's child

    def __init__(self, dim: int, num_heads: int, attn_layer: Any, attn_drop: float = 0.0, proj_drop: float = 0.0, qkv_bias: bool = False,
                 qk_norm: bool = False, scale_attn_norm: bool = False, device: Any = None, dtype: Any = None, **kwargs: Any):
        refused = dict(qkv_bias=qkv_bias, qk_norm=qk_norm, scale_attn_norm=scale_attn_norm)
        if any(refused.values()):
            raise ValueError(f"dual attention has no {', '.join(name for name, wanted in refused.items() if wanted)}")
        super().__init__(dim, num_heads=1, proj_drop=proj_drop, device=device, dtype=dtype, **kwargs)  # its attention goes
        self.attn = DualAttention(dim, **attn_layer, attn_drop=attn_drop, proj_drop=proj_drop, device=device, dtype=dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        symbols = self.retrieve[0](x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), symbols, attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionDualAttentionTransformer(AnySizeVisionTransformer):
    """A vision transformer of `DualAttention`, whose symbols are retrieved before each block by one `SymbolicAttention`, any input size.

    Patches are normalised before and after their projection, there is no norm before the head, GELU is the one with tanh. Without
    pooling it gives the map of the patches.

    Args:
        self_heads, relational_heads: of each block, in the place of timm's `num_heads`.
        num_relations, activation, symmetric: see `zoo.layers.RelationalAttention`.
        num_symbols, symbol_heads: of `zoo.layers.SymbolicAttention`.
        kwargs: timm's, but for num_heads, qkv_bias, qk_norm, scale_attn_norm and layers of one's own.

    Difference from the authors' code (https://github.com/Awni00/dual-attention): `global_pool="avg"` is the mean of the patches, as in
    timm, where theirs takes the class token into it.
    """

    def __init__(
        self, self_heads: int = 6, relational_heads: int = 6, num_relations: int | None = None, activation: str = "identity",
        symmetric: bool = False, num_symbols: int = 16, symbol_heads: int = 4, embed_dim: int = 384, attn_drop_rate: float = 0.0,
        weight_init: str = "", **kwargs: Any,
    ):
        if "num_heads" in kwargs:
            raise ValueError(f"heads are self_heads and relational_heads, got num_heads {kwargs['num_heads']}")
        if weight_init not in ("", "reset", "skip"):
            raise ValueError(f"weight_init must be '', 'reset' or 'skip', got {weight_init!r}")
        attention: Any = dict(self_heads=self_heads, relational_heads=relational_heads, num_relations=num_relations, activation=activation,
                              symmetric=symmetric)
        super().__init__(**{**dict(
            embed_dim=embed_dim, num_heads=self_heads + relational_heads, qkv_bias=False, block_fn=DualAttentionBlock, attn_layer=attention,
            embed_layer=NormedPatchEmbed, embed_norm_layer=nn.LayerNorm, norm_layer=nn.LayerNorm, act_layer=GELUTanh, final_norm=False,
            attn_drop_rate=attn_drop_rate, weight_init="skip"), **kwargs})
        self.symbol_retriever = SymbolicAttention(
            embed_dim, symbol_heads, num_symbols, attn_drop_rate, kwargs.get("device"), kwargs.get("dtype"))
        for block in self.blocks:
            cast(DualAttentionBlock, block).retrieve = (self.symbol_retriever,)
        self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """The authors' values: torch's of linear layers, and normal ones of positions and the class token."""
        if needs_reset:
            reset_parameters(self)
        for parameter in (self.pos_embed, self.cls_token, self.reg_token):
            if parameter is not None:
                nn.init.normal_(parameter)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        return {**groups, "stem": f"{groups['stem']}|symbol_retriever"}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names and shapes of the authors' class; files for another number of channels or size of image, as timm's."""
    network = cast(VisionDualAttentionTransformer, model)
    names = {"to_patch_embedding.1.": "patch_embed.norm_in.", "to_patch_embedding.2.": "patch_embed.proj.",
             "to_patch_embedding.3.": "patch_embed.norm.", "pos_embedding": "pos_embed", "encoder_blocks.": "blocks.",
             ".dual_attn.": ".attn.", ".ff_block.linear": ".mlp.fc", "final_out.": "head."}
    height, width = cast(tuple[int, int], network.patch_embed.patch_size)
    converted = {}
    for name, value in state_dict.items():
        if name.startswith("to_patch_embedding") and value.shape[-1] != network.embed_dim or name == "to_patch_embedding.2.weight":
            value = value.unflatten(-1, (height, width, -1)).movedim(-1, -3)  # (rows, columns, channels) of a patch
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "norm_in" in name and value.shape[0] != network.in_chans:
            value = value.mean(0, keepdim=True).expand(network.in_chans, -1, -1)
        converted[name] = value
    return cast(dict[str, Tensor], vit.checkpoint_filter_fn(converted, network))


def _cfg() -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=None, crop_pct=0.875, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="patch_embed.proj", classifier="head",
        paper_ids="arXiv:2405.16727",
        paper_name="Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
    )


default_cfgs = generate_default_cfgs({"vidat_nano_patch16_224.untrained": _cfg()})


@register_model
def vidat_nano_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionDualAttentionTransformer:
    """For small images and machines; not in the paper."""
    args: dict[str, Any] = dict(dict(embed_dim=96, depth=4, self_heads=2, relational_heads=2), **kwargs)
    return build_model_with_cfg(
        VisionDualAttentionTransformer, "vidat_nano_patch16_224", pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(args["depth"])), feature_cls="getter"), **args)
