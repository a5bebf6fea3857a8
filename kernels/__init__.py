"""Operators: pure functions on tensors.

Those with Triton kernels run them on CUDA and HIP tensors, and their reference in PyTorch elsewhere, in exported graphs and for
arguments that the kernels do not take. An operator's argument `backend`, or `default_backend` around any call, decides
otherwise: "reference" always runs, "triton" raises a ValueError saying why where it cannot. `python -m zoo.kernels` says what
this machine runs.
"""
from ._backends import default_backend
from .attention_similarity import attention_similarity
from .deform_conv2d import deform_conv2d
from .depthwise_dynamic_conv2d import depthwise_dynamic_conv2d
from .halo_attention import halo_attention
from .region_routes import region_means, region_routes
from .routing_attention import routing_attention
from .token_aware_avg_pool import token_aware_avg_pool

__all__ = [
    "attention_similarity", "default_backend", "deform_conv2d", "depthwise_dynamic_conv2d", "halo_attention", "region_means",
    "region_routes", "routing_attention", "token_aware_avg_pool",
]
