"""Attention mechanisms as timm models: `import zoo`, then `timm.create_model(...)`."""
from . import _command

__version__ = "0.2.0"

if not _command.import_is_put_off:
    from .attach import attach
    from .attention_removal import attention_share, choose_blocks, remove_attention
    from .fixations import FixationDivergenceLoss, FixationLoss
    from .heads import head_importance, prune_heads, regroup_heads
    from .layers import capture
    from .losses import (
        AttentionDistillationLoss,
        AttentionDiversificationLoss,
        ConnectivityLoss,
        LoadBalancingLoss,
        MultipleInstanceLoss,
        PartDiscoveryLoss,
        SaliencyPyramidLoss,
        SparsifinerReconstructionLoss,
        TeacherAttentionLoss,
        TokenDistillationLoss,
    )
    from .models import (
        MECHANISMS,
        REPORTED_TOP1,
        a2n,
        attnet,
        biformer,
        das,
        dconnnet,
        deit,
        fan,
        halonet,
        han,
        ifam,
        inspyrenet,
        lambda_deit,
        list_models,
        litv2,
        mechanism_of,
        msinet,
        polarized,
        saliency_mamba,
        sknet,
        transnext,
        unet,
        vidat,
        vmamba,
    )
    from .probe import probe
    from .reparametrization import fold, reparametrize
    from .replace_attention import replace_attention
    from .weights import load_weights, weights_in

__all__ = [
    "MECHANISMS", "REPORTED_TOP1", "AttentionDistillationLoss", "AttentionDiversificationLoss", "ConnectivityLoss",
    "FixationDivergenceLoss", "FixationLoss", "LoadBalancingLoss", "MultipleInstanceLoss", "PartDiscoveryLoss", "SaliencyPyramidLoss",
    "SparsifinerReconstructionLoss", "TeacherAttentionLoss", "TokenDistillationLoss", "a2n", "attach", "attention_share", "attnet",
    "biformer", "capture", "choose_blocks", "das", "dconnnet", "deit", "fan", "fold", "halonet", "han", "head_importance", "ifam",
    "inspyrenet", "lambda_deit", "list_models", "litv2", "load_weights", "mechanism_of", "msinet", "polarized", "probe", "prune_heads",
    "regroup_heads", "remove_attention", "reparametrize", "replace_attention", "saliency_mamba", "sknet", "transnext", "unet", "vidat",
    "vmamba", "weights_in",
]
