"""Attention mechanisms as timm models: `import zoo`, then `timm.create_model(...)`."""
import timm

from . import attnet, biformer, das, deit, fan, halonet, litv2, polarized, sknet, unet
from .attach import attach
from .layers import capture
from .losses import AttentionDiversificationLoss

__all__ = [
    "REPORTED_TOP1", "AttentionDiversificationLoss", "attach", "attnet", "biformer", "capture", "das", "deit", "fan", "halonet",
    "list_models", "litv2", "polarized", "sknet", "unet",
]

REPORTED_TOP1 = {  # per cent on ImageNet-1k, by the authors
    name: top1
    for family in (attnet, biformer, das, deit, fan, halonet, litv2, polarized, sknet)
    for name, top1 in getattr(family, "REPORTED_TOP1", {}).items()
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo's registered models that match a shell-style pattern."""
    return [name for name in timm.list_models(pattern) if timm.model_entrypoint(name).__module__.split(".")[0] == __name__]
