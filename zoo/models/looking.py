"""What networks that say where people look have in common."""
from typing import Any

from timm.layers import register_notrace_function
from torch import Tensor, nn

from zoo.layers._scripting import refuse_scripting

__all__ = ["FixationNetwork"]


class FixationNetwork(nn.Module):
    """Base of networks (B, in_chans, H, W) → (B, 1, H, W), maps from 0 to 1. Families set `head`, which makes the map."""

    __prepare_scriptable__ = refuse_scripting
    pretrained_cfg: dict[str, Any]
    task = "fixations"
    head: nn.Module

    def __init__(self, num_classes: int):
        super().__init__()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        if num_classes != 1:
            raise ValueError(f"num_classes must be 1, the map of fixations, got {num_classes}")
        self.num_classes = num_classes


@register_notrace_function
def checked(x: Tensor, in_chans: int, network: str) -> Tensor:
    """x, unless it is of another shape."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"{network}: x must be (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
    return x
