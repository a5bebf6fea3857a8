"""Attention mechanisms as timm models: `import zoo`, then `timm.create_model(...)`."""
from . import _command

__version__ = "0.2.0"

if not _command.import_is_put_off:
    from .attach import attach
    from .heads import head_importance, prune_heads
    from .layers import capture
    from .losses import AttentionDistillationLoss, AttentionDiversificationLoss
    from .models import (
        MECHANISMS,
        REPORTED_TOP1,
        attnet,
        biformer,
        das,
        deit,
        fan,
        halonet,
        list_models,
        litv2,
        mechanism_of,
        polarized,
        sknet,
        unet,
    )
    from .probe import probe
    from .reparametrization import fold, reparametrize
    from .replace_attention import replace_attention
    from .weights import load_weights, weights_in

__all__ = [
    "MECHANISMS", "REPORTED_TOP1", "AttentionDistillationLoss", "AttentionDiversificationLoss", "attach", "attnet", "biformer",
    "capture", "das", "deit", "fan", "fold", "halonet", "head_importance", "list_models", "litv2", "load_weights", "mechanism_of",
    "polarized", "probe", "prune_heads", "reparametrize", "replace_attention", "sknet", "unet", "weights_in",
]
