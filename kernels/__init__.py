"""Operators: pure functions on tensors."""
from .region_routes import region_means, region_routes
from .routing_attention import routing_attention

__all__ = ["region_means", "region_routes", "routing_attention"]
