"""Feature maps of any hierarchical timm model, for networks built around one."""
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import get_device_dtype
from timm.models import FeatureInfo
from torch import Tensor, nn

from zoo.errors import InputError, near_misses
from zoo.models.building import names_weights
from zoo.weights import load_weights


class TimmEncoder(nn.Module):
    """A timm model's feature maps, as (B, C, H, W), finest first."""

    channels: list[int]
    reductions: list[int]

    def __init__(self, name: str, in_chans: int, **args: Any):
        super().__init__()
        if not timm.is_model(name):
            raise InputError(f"encoder must be a model that timm knows, got {name!r}{near_misses(name, timm.list_models())}")
        try:
            self._create = partial(timm.create_model, name, in_chans=in_chans, **args)
            self.model = self._make()
        except (RuntimeError, AttributeError, NotImplementedError) as error:  # models without feature maps, each in its way
            raise InputError(f"encoder {name} cannot give feature maps: {error}") from error
        info = cast(FeatureInfo, self.model.feature_info)
        self.channels, self.reductions = info.channels(), info.reduction()
        if any(fine >= coarse for fine, coarse in zip(self.reductions, self.reductions[1:], strict=False)):
            raise InputError(f"encoder {name} is not hierarchical: its maps are the input's size divided by {self.reductions}")

    def _make(self, **more: Any) -> nn.Module:
        return self._create(features_only=True, **more)

    def load_weights(self, file: str) -> None:
        """Takes the weights of a classifier of the encoder's name in a file, as `zoo.weights.load_weights` reads it."""
        whole = self._create()
        load_weights(whole, file, new_head=True)
        self.model.load_state_dict(self._make(pretrained=True, pretrained_cfg_overlay={"state_dict": whole.state_dict()}).state_dict())

    def reset_parameters(self) -> None:
        """Values of a new encoder; timm's models without head have no method for that."""
        new = self._make(**get_device_dtype(self.model))
        with torch.no_grad():
            for old, value in zip(_tensors(self.model), _tensors(new), strict=True):
                old.copy_(value)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.model(x)
        return [x.permute(0, 3, 1, 2) for x in maps] if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else maps

    def set_grad_checkpointing(self, enable: bool) -> None:
        network = self.model if hasattr(self.model, "set_grad_checkpointing") else self.model.model  # timm wraps some
        cast(Any, network).set_grad_checkpointing(enable)


def pretrained_encoder(pretrained: bool, kwargs: dict[str, Any]) -> bool:
    """Makes `pretrained` one of the encoder's arguments where it is about it; returns whether it is about the whole network."""
    if kwargs.get("encoder") and pretrained and not names_weights(kwargs):
        kwargs["encoder_args"] = dict(kwargs.get("encoder_args") or {}, pretrained=True)
        return False
    return pretrained


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
