"""What rows of a model file are built of. A checkpoint names these classes, so that loading one imports `zoo.yolo`."""
from typing import Any

from torch import Tensor, nn

import zoo.layers
from zoo.backbones import FeatureMaps
from zoo.errors import InputError

MAPS = ("ATConv", "AttentionInAttention", "ChannelSpatialAttention", "DAS", "DeformableTokenMerging", "HaloAttention",
        "PolarizedSelfAttention", "SelectiveKernelUnit")
TOKENS = ("AggregatedAttention", "BiLevelRoutingAttention", "ChannelProcessing", "ContextBroadcast", "FullyAttentionalBlock",
          "HiLoAttention", "LengthScaledAttention", "TokenAwareAvgPool", "TokenMixing")
GATES = ("AttentionGate", "MultiAttentionGate")
LAYERS = (*MAPS, *TOKENS, *GATES)
OUT_WIDTH = {"DeformableTokenMerging": "out_dim", "HaloAttention": "dim_out", "SelectiveKernelUnit": "out_dim"}


class Layer(nn.Module):
    """A layer of `zoo.layers` between maps: (B, C, H, W) → (B, C', H', W'); attention gates take the list of the map and the signal.

    Args:
        name: of the layer, one of `LAYERS`.
        widths: channels of the map, or of the map and of the gating signal.
        args: further arguments of the layer.
    """

    def __init__(self, name: str, *widths: int, **args: Any):
        super().__init__()
        self.channels_last = name in TOKENS
        self.layer = getattr(zoo.layers, name)(*widths, **args)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x, list):
            return self.layer(*x)
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else self.layer(x)


class Backbone(nn.Module):
    """The maps of a timm model at strides 4, 8, 16 and 32: (B, 3, H, W) → a list of (B, `channels[i]`, H / `strides[i]`, W / `strides[i]`).

    Args:
        name: of a model that timm knows, zoo's among them.
        args: further arguments of `timm.create_model`, such as `pretrained` or `drop_path_rate`.

    Raises InputError for a name, or an argument, that is not known, and for a model without feature maps.
    """

    def __init__(self, name: str, **args: Any):
        super().__init__()
        try:
            self.maps = FeatureMaps(name, **args)
        except TypeError as error:
            raise InputError(f"model {name} does not take these arguments, {args}: {error}") from error
        self.channels, self.strides = (list(of.values()) for of in (self.maps.channels, self.maps.strides))

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.maps(x).values())
