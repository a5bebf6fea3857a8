"""Operators: pure functions on tensors."""
from .attention_similarity import attention_similarity
from .deform_conv2d import deform_conv2d
from .depthwise_dynamic_conv2d import depthwise_dynamic_conv2d
from .region_routes import region_means, region_routes
from .routing_attention import routing_attention
from .token_aware_avg_pool import token_aware_avg_pool

__all__ = [
    "attention_similarity", "deform_conv2d", "depthwise_dynamic_conv2d", "region_means", "region_routes", "routing_attention",
    "token_aware_avg_pool",
]
