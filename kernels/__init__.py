"""Operators: pure functions on tensors.

An operator has several backends, named in `backends(operator)`:

- "reference": the definition in plain PyTorch. It runs everywhere, is what the others are tested with, and what runs under the
  transforms of torch.func (grad, vmap, jvp, …) and in forward-mode differentiation.
- others in PyTorch, faster or in less memory, named by what they do, and "pytorch": the one that suits the arguments best.
- "triton": its kernels, where it has any.

By default CUDA and HIP tensors take the kernels, if those take the arguments, and all others "pytorch". An operator's argument
`backend`, or `default_backend` around any call, decides otherwise; a backend that cannot run raises a ValueError that says why.
Exported graphs hold plain PyTorch whatever is asked. `python -m zoo.kernels` says what this machine runs.

All operators are leaves of `torch.fx` graphs, register with `torch.library` what is not plain PyTorch, and tell
`torch.utils.flop_counter.FlopCounterMode` the products that their definition takes.
"""
if __name__ == "zoo.kernels":  # and not where a checkout on the path is taken for the package `kernels` of Hugging Face's hub
    from ._backends import backends, default_backend
    from .attention_cross_entropy import attention_cross_entropy
    from .attention_similarity import attention_similarity
    from .deform_conv2d import deform_conv2d
    from .depthwise_dynamic_conv2d import depthwise_dynamic_conv2d
    from .entmax import entmax
    from .halo_attention import halo_attention
    from .pyramid_sparse_attention import pyramid_sparse_attention
    from .region_routes import region_means, region_routes
    from .routing_attention import routing_attention
    from .selective_scan import selective_scan
    from .token_aware_avg_pool import token_aware_avg_pool

__all__ = [
    "attention_cross_entropy", "attention_similarity", "backends", "default_backend", "deform_conv2d", "depthwise_dynamic_conv2d",
    "entmax", "halo_attention", "pyramid_sparse_attention", "region_means", "region_routes", "routing_attention", "selective_scan",
    "token_aware_avg_pool",
]
