"""The mechanisms of the literature as layers for anybody's model."""
from .atconv import ATConv
from .bi_level_routing_attention import BiLevelRoutingAttention
from .das import DAS
from .halo import HaloAttention
from .pointwise_linear import PointwiseLinear
from .polarized import PolarizedSelfAttention
from .selective_kernel import SelectiveKernelUnit

__all__ = [
    "DAS", "ATConv", "BiLevelRoutingAttention", "HaloAttention", "PointwiseLinear", "PolarizedSelfAttention", "SelectiveKernelUnit",
]
