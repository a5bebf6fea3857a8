"""Operators: pure functions on tensors."""
from .deform_conv2d import deform_conv2d
from .depthwise_dynamic_conv2d import depthwise_dynamic_conv2d
from .halo_attention import halo_attention
from .region_routes import region_means, region_routes
from .routing_attention import routing_attention

__all__ = ["deform_conv2d", "depthwise_dynamic_conv2d", "halo_attention", "region_means", "region_routes", "routing_attention"]
