"""The mechanisms of the literature as layers for anybody's model."""
from .bi_level_routing_attention import BiLevelRoutingAttention
from .pointwise_linear import PointwiseLinear

__all__ = ["BiLevelRoutingAttention", "PointwiseLinear"]
