"""The mechanisms of the literature as layers for anybody's model."""
from ._capture import capture
from .atconv import ATConv
from .attention_gate import AttentionGate, MultiAttentionGate
from .bi_level_routing_attention import BiLevelRoutingAttention
from .das import DAS
from .deformable_token_merging import DeformableTokenMerging
from .hilo import HiLoAttention
from .pointwise_linear import PointwiseLinear
from .polarized import PolarizedSelfAttention
from .selective_kernel import SelectiveKernelUnit

__all__ = [
    "DAS", "ATConv", "AttentionGate", "BiLevelRoutingAttention", "DeformableTokenMerging", "HiLoAttention", "MultiAttentionGate",
    "PointwiseLinear", "PolarizedSelfAttention", "SelectiveKernelUnit", "capture",
]
