"""What rows of a model file are built of. A checkpoint names these classes, so that loading one imports `zoo.yolo`."""
from typing import Any

import timm
from torch import Tensor, nn

import zoo.layers
from zoo.errors import InputError, near_misses

MAPS = ("ATConv", "DAS", "DeformableTokenMerging", "HaloAttention", "PolarizedSelfAttention", "SelectiveKernelUnit")
TOKENS = ("BiLevelRoutingAttention", "ChannelProcessing", "ContextBroadcast", "FullyAttentionalBlock", "HiLoAttention",
          "TokenAwareAvgPool", "TokenMixing")
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
    """All feature maps of a timm model, zoo's among them: (B, 3, H, W) → a list of (B, `channels[i]`, H / `strides[i]`, W / `strides[i]`).

    Args:
        name: of a model that timm knows.
        args: further arguments of `timm.create_model`, such as `pretrained` or `drop_path_rate`.

    Raises InputError for a name, or an argument, that is not known, and for a model without feature maps.
    """

    def __init__(self, name: str, **args: Any):
        super().__init__()
        if not timm.is_model(name):
            raise InputError(f"there is no model {name!r}{near_misses(name, timm.list_models())}")
        try:
            network = timm.create_model(name, num_classes=0, **args)
        except TypeError as error:
            raise InputError(f"model {name} does not take these arguments, {args}: {error}") from error
        info = getattr(network, "feature_info", None)
        if not info or not hasattr(network, "forward_intermediates"):
            raise InputError(f"model {name} gives no feature maps: it has no forward_intermediates")
        self.channels = [level["num_chs"] for level in info]
        self.strides = [level["reduction"] for level in info]
        self.indices = network.prune_intermediate_layers(list(range(len(info))), prune_norm=True)
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.forward_intermediates(x, indices=self.indices, intermediates_only=True)
