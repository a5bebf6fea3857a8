"""The mechanisms of the literature as layers for anybody's model."""
from .bi_level_routing_attention import BiLevelRoutingAttention

__all__ = ["BiLevelRoutingAttention"]
