"""The mechanisms of the literature as layers for anybody's model."""
from .atconv import ATConv
from .bi_level_routing_attention import BiLevelRoutingAttention
from .context_broadcast import ContextBroadcast
from .das import DAS
from .fully_attentional import ChannelProcessing, FullyAttentionalBlock, TokenMixing
from .pointwise_linear import PointwiseLinear
from .polarized import PolarizedSelfAttention
from .selective_kernel import SelectiveKernelUnit
from .token_aware_avg_pool import TokenAwareAvgPool

__all__ = [
    "DAS", "ATConv", "BiLevelRoutingAttention", "ChannelProcessing", "ContextBroadcast", "FullyAttentionalBlock", "PointwiseLinear",
    "PolarizedSelfAttention", "SelectiveKernelUnit", "TokenAwareAvgPool", "TokenMixing",
]
