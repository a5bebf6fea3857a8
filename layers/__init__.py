"""The mechanisms of the literature as layers for anybody's model."""
from .atconv import ATConv
from .bi_level_routing_attention import BiLevelRoutingAttention
from .polarized import PolarizedSelfAttention
from .selective_kernel import SelectiveKernelUnit

__all__ = ["ATConv", "BiLevelRoutingAttention", "PolarizedSelfAttention", "SelectiveKernelUnit"]
