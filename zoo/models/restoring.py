"""What networks that give pictures, such as a sharper one of what they are given, have in common."""
from typing import Any

from timm.layers import register_notrace_function
from torch import Tensor, nn

from zoo.layers._scripting import refuse_scripting
from zoo.models.building import Model, build_model_with_cfg
from zoo.models.staged import reset_parameters
from zoo.weights import Filter

__all__ = ["RestorationNetwork", "restoration_cfg", "restoration_network"]


class RestorationNetwork(nn.Module):
    """Base of networks (B, in_chans, H, W) → (B, in_chans, scale·H, scale·W), pictures in the range 0 to 255 on both sides.

    They have no classes, and no features_only. Families set `num_features`, the width of what `forward_features` gives, at the input's
    size, and `in_chans`, `scale`, `grad_checkpointing`.
    """

    task = "restoration"
    __prepare_scriptable__ = refuse_scripting
    pretrained_cfg: dict[str, Any]

    def __init__(self, in_chans: int, num_classes: int, scale: int, scales: tuple[int, ...]):
        super().__init__()
        if num_classes:
            raise ValueError(f"num_classes must be 0, as the answer is a picture, got {num_classes}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        if scale not in scales:
            raise ValueError(f"scale must be one of {', '.join(map(str, scales))}, got {scale}")
        self.in_chans, self.num_classes, self.scale = in_chans, num_classes, scale
        self.grad_checkpointing = False

    def init_weights(self, needs_reset: bool = True) -> None:
        """Values of a new network, as in timm. Nothing is left for it where modules have just been made."""
        if needs_reset:
            reset_parameters(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return set()


@register_notrace_function
def checked(x: Tensor, in_chans: int) -> Tensor:
    """x, unless it is of another shape."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x must be (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
    return x


def restoration_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's config of such a network: `std` brings pixels in [0, 1] to the range 0 to 255."""
    cfg = dict(num_classes=0, input_size=(3, 48, 48), pool_size=None, crop_pct=1.0, interpolation="bicubic", mean=(0.0, 0.0, 0.0),
               std=(1 / 255,) * 3, classifier=None)
    return cfg | kwargs


def restoration_network(model_cls: type[Model], variant: str, pretrained: bool, filter_fn: Filter, **kwargs: Any) -> Model:
    if kwargs.get("features_only"):
        raise RuntimeError(f"features_only is not implemented for {variant}, which gives a picture")
    return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=filter_fn, **kwargs)
