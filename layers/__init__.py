"""The mechanisms of the literature as layers for anybody's model."""
from ._capture import capture
from ._scripting import refuse_scripting
from .aggregated_attention import AggregatedAttention, LengthScaledAttention
from .atconv import ATConv
from .attention_gate import AttentionGate, MultiAttentionGate
from .attention_in_attention import AttentionInAttention
from .attention_removal import DilutedBlock, DilutedPostNormBlock, NoAttention
from .bi_level_routing_attention import BiLevelRoutingAttention
from .connectivity import bilateral_voting, connectivity_target
from .context_broadcast import ContextBroadcast
from .das import DAS
from .deformable_token_merging import DeformableTokenMerging
from .dual_attention import DualAttention, RelationalAttention, SymbolicAttention
from .efficient_probing import EfficientProbing
from .fully_attentional import ChannelProcessing, FullyAttentionalBlock, TokenMixing
from .halo import HaloAttention
from .hedgehog import HedgehogAttention
from .hilo import HiLoAttention
from .holistic import ChannelSpatialAttention, LayerAttention
from .mixture_of_heads import MixtureOfHeadAttention, MixtureOfHeads
from .multiple_instance import MultipleInstanceHead
from .normalized_attention import NormalizedAttention
from .part_discovery import PartDiscovery
from .polarized import PolarizedSelfAttention
from .pyramid_attention import AxialAttention, PyramidAxialAttention, ScaleInvariantContextAttention
from .pyramid_sparse import PyramidSparseAttention, gilbert_order, pyramid_levels
from .selective_kernel import SelectiveKernelUnit
from .selective_scan_2d import SelectiveScan2d
from .self_attention import AROUND, SelfAttention
from .simpool import SimPool
from .sparsifiner import SparsifinerAttention
from .token_aware_avg_pool import TokenAwareAvgPool

__all__ = [
    "DAS", "ATConv", "AggregatedAttention", "AttentionGate", "AttentionInAttention", "AxialAttention", "BiLevelRoutingAttention",
    "ChannelProcessing", "ChannelSpatialAttention", "ContextBroadcast", "DeformableTokenMerging", "DualAttention", "EfficientProbing",
    "FullyAttentionalBlock", "HaloAttention", "HedgehogAttention", "HiLoAttention", "LayerAttention", "LengthScaledAttention",
    "MixtureOfHeadAttention", "MixtureOfHeads", "MultiAttentionGate", "MultipleInstanceHead", "NormalizedAttention", "PartDiscovery",
    "PolarizedSelfAttention", "PyramidAxialAttention", "PyramidSparseAttention", "RelationalAttention", "ScaleInvariantContextAttention",
    "SelectiveKernelUnit", "SelectiveScan2d", "SelfAttention", "SimPool", "SparsifinerAttention", "SymbolicAttention", "TokenAwareAvgPool",
    "TokenMixing", "bilateral_voting", "capture", "connectivity_target", "gilbert_order", "pyramid_levels",
]

for _layer in [*(globals()[name] for name in __all__), *AROUND.values(), NoAttention, DilutedBlock, DilutedPostNormBlock]:
    if isinstance(_layer, type):
        _layer.__prepare_scriptable__ = refuse_scripting
