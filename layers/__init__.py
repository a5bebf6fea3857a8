"""The mechanisms of the literature as layers for anybody's model."""
from .atconv import ATConv
from .bi_level_routing_attention import BiLevelRoutingAttention
from .das import DAS
from .deformable_token_merging import DeformableTokenMerging
from .halo import HaloAttention
from .hilo import HiLoAttention
from .pointwise_linear import PointwiseLinear
from .polarized import PolarizedSelfAttention
from .selective_kernel import SelectiveKernelUnit

__all__ = [
    "DAS", "ATConv", "BiLevelRoutingAttention", "DeformableTokenMerging", "HaloAttention", "HiLoAttention", "PointwiseLinear",
    "PolarizedSelfAttention", "SelectiveKernelUnit",
]
