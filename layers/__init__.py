"""The mechanisms of the literature as layers for anybody's model."""
from ._capture import capture
from ._scripting import refuse_scripting
from .atconv import ATConv
from .attention_gate import AttentionGate, MultiAttentionGate
from .bi_level_routing_attention import BiLevelRoutingAttention
from .context_broadcast import ContextBroadcast
from .das import DAS
from .deformable_token_merging import DeformableTokenMerging
from .efficient_probing import EfficientProbing
from .fully_attentional import ChannelProcessing, FullyAttentionalBlock, TokenMixing
from .halo import HaloAttention
from .hedgehog import HedgehogAttention
from .hilo import HiLoAttention
from .normalized_attention import NormalizedAttention
from .polarized import PolarizedSelfAttention
from .pyramid_sparse import PyramidSparseAttention, gilbert_order, pyramid_levels
from .selective_kernel import SelectiveKernelUnit
from .self_attention import AROUND, SelfAttention
from .simpool import SimPool
from .token_aware_avg_pool import TokenAwareAvgPool

__all__ = [
    "DAS", "ATConv", "AttentionGate", "BiLevelRoutingAttention", "ChannelProcessing", "ContextBroadcast", "DeformableTokenMerging",
    "EfficientProbing", "FullyAttentionalBlock", "HaloAttention", "HedgehogAttention", "HiLoAttention", "MultiAttentionGate",
    "NormalizedAttention", "PolarizedSelfAttention", "PyramidSparseAttention", "SelectiveKernelUnit", "SelfAttention", "SimPool",
    "TokenAwareAvgPool", "TokenMixing", "capture", "gilbert_order", "pyramid_levels",
]

for _layer in [*(globals()[name] for name in __all__), *AROUND.values()]:
    if isinstance(_layer, type):
        _layer.__prepare_scriptable__ = refuse_scripting
