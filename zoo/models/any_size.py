"""timm's vision transformer for images of any size."""
from typing import Any

import torch
from timm.layers import register_notrace_function, resample_abs_pos_embed
from timm.models import vision_transformer as vit
from torch import Tensor

from zoo.layers._scripting import refuse_scripting

__all__ = ["AnySizeVisionTransformer"]


class AnySizeVisionTransformer(vit.VisionTransformer):
    """timm's vision transformer, any input size.

    Images that the patches do not divide are padded, position embeddings interpolated. Arguments are timm's.

    Raises ValueError for a batch of no images, which timm's cannot shape.

    Difference from timm's: without pooling (`global_pool=""`), calling it gives the map of the patches, (B, C, H, W), instead
    of the sequence of tokens.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, **kwargs: Any):
        super().__init__(dynamic_img_size=True, dynamic_img_pad=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.global_pool:
            return out
        size = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        return out[:, self.num_prefix_tokens :].unflatten(1, size).permute(0, 3, 1, 2)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's for any size, called from here, where `torch.fx` takes the functions as they are."""
        batch, height, width, channels = holding_images(x).shape
        prefix = [tokens.expand(batch, -1, -1) for tokens in (self.cls_token, self.reg_token) if tokens is not None]
        x, within = x.reshape(batch, height * width, channels), not self.no_embed_class
        if self.pos_embed is None:
            return torch.cat([*prefix, x], 1)
        position = resample_abs_pos_embed(
            self.pos_embed, [height, width], self.patch_embed.grid_size, self.num_prefix_tokens if within else 0)
        x = torch.cat([*prefix, x], 1) + position if within else torch.cat([*prefix, x + position], 1)
        return self.pos_drop(x)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() & {name for name, _ in self.named_parameters()}


@register_notrace_function
def holding_images(x: Tensor) -> Tensor:
    """x, unless it holds no image."""
    if not x.shape[0]:
        raise ValueError("vision transformers need at least one image, and x holds none")
    return x


torch.fx.wrap("holding_images")
torch.fx.wrap("resample_abs_pos_embed")
