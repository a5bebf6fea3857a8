"""Any timm model as the backbone of networks of torchvision and of others who take maps by name."""
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.models.detection import backbone_utils
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

import zoo.models  # noqa: F401  registers what is named
from zoo.errors import InputError, near_misses

STRIDES = (4, 8, 16, 32)


class FeatureMaps(nn.Module):
    """Feature maps of a timm model by name, as torchvision's networks take them: (B, C, H, W) → an OrderedDict of (B, C_i, H_i, W_i).

    Without the model's head and last norm. `channels` are the widths C_i, `strides` H / H_i, both by name.

    Args:
        name: a name registered with timm, of a model with `forward_intermediates`.
        layers: the maps, by the names that they get, in the numbering of the model's `feature_info`, from its end if negative. By
            default the last ones at strides 4, 8, 16 and 32, named "0", "1", …
        args: further arguments of `timm.create_model`, such as `drop_path_rate`, `in_chans` or `pretrained`.

    Raises InputError for an unknown name, a model without feature maps, and maps that it does not have.
    """

    def __init__(self, name: str, layers: Mapping[str, int] | None = None, **args: Any):
        super().__init__()
        if not timm.is_model(name):
            raise InputError(f"unknown model {name!r}{near_misses(name, timm.list_models())}")
        model: Any = timm.create_model(name, **args)
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"model {name} gives no feature maps: it has no forward_intermediates")
        info = list(model.feature_info)
        if layers is None:
            last = {level["reduction"]: index for index, level in enumerate(info)}
            layers = {str(place): last[stride] for place, stride in enumerate(stride for stride in STRIDES if stride in last)}
        if not layers or not all(-len(info) <= index < len(info) for index in layers.values()):
            raise InputError(f"layers={dict(layers)}: {name} has {len(info)} feature maps, from 0 to {len(info) - 1}")
        numbers = {key: index % len(info) for key, index in layers.items()}
        self.layers = dict(sorted(numbers.items(), key=lambda layer: layer[1]))  # as the model gives them
        self.channels = {key: info[index]["num_chs"] for key, index in self.layers.items()}
        self.strides = {key: info[index]["reduction"] for key, index in self.layers.items()}
        model.prune_intermediate_layers(list(self.layers.values()), prune_norm=True)
        self.model = model

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.model.forward_intermediates(x, indices=list(self.layers.values()), intermediates_only=True)
        return OrderedDict(zip(self.layers, maps, strict=True))


class BackboneWithFPN(backbone_utils.BackboneWithFPN):
    """torchvision's `BackboneWithFPN` around a timm model: a feature pyramid of `out_channels` channels over `FeatureMaps`.

    Args:
        name, layers, args: see `FeatureMaps`.
        out_channels: width of all maps of the pyramid.
        extra_blocks: what adds coarser maps; by default one by max pooling, as torchvision has it.
        norm_layer: a norm behind the pyramid's convolutions, as torchvision takes it.
    """

    def __init__(self, name: str, layers: Mapping[str, int] | None = None, out_channels: int = 256,
                 extra_blocks: ExtraFPNBlock | None = None, norm_layer: Any = None, **args: Any):
        nn.Module.__init__(self)  # torchvision's takes apart a network whose children follow one after the other
        self.body = FeatureMaps(name, layers, **args)
        self.fpn = FeaturePyramidNetwork(list(self.body.channels.values()), out_channels, extra_blocks or LastLevelMaxPool(), norm_layer)
        self.out_channels = out_channels
