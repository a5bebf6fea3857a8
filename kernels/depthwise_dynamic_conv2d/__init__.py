from torch import Tensor

from .._backends import choose, observed, public_operator, remembered
from .._checking import check_tensors
from .._layout import span, too_large
from . import grouped, positions_first, reference

__all__ = ["depthwise_dynamic_conv2d"]


@public_operator
def depthwise_dynamic_conv2d(x: Tensor, kernels: Tensor, theta: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Convolution with one k×k kernel per sample and channel (ATConv, arXiv 2510.20092, equations 9 and 10).

        out[b, c, i, j] = Σ_uv K[b, c, u, v] x[b, c, i + u - ⌊k/2⌋, j + v - ⌊k/2⌋],  x being 0 outside the map
        K = kernels - sigmoid(theta) · mean_uv(kernels),  or K = kernels without theta

    Subtracting the mean is the paper's lateral inhibition: the weights of a kernel compete for a sum that theta → ∞ makes 0.

    Args:
        x: (B, C, H, W). float32, float64, float16, bfloat16.
        kernels: (B, C, k, k) of the same dtype (under autocast: of any), not flipped; sides odd, not necessarily equal.
        theta: (C,) or None.
        backend: "reference" (a product with the neighbourhoods), "grouped" (a convolution with a group for every sample and channel),
            "positions_first" (the same for maps whose channels lie innermost), "pytorch" (which of them suits the memory layout),
            "triton"; default what suits the device, see `zoo.kernels`.

    Returns:
        (B, C, H, W) in the memory layout of x: contiguous, channels-last, or with positions before batch before channels
        (`x.permute(2, 3, 0, 1)` is contiguous). Differentiable any number of times in all arguments.

    The Triton kernels take every layout as it is, subtract the mean where they read the kernels, and add in float32 in a fixed
    order. For the grouped convolution channels-last maps are copied. Graphs exported with a free batch hold the reference, as ONNX
    knows no free number of groups, others the grouped convolution.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    seen = observed((x, kernels, theta, backend))
    chosen = _chosen(seen, x, kernels, theta, backend)
    if chosen == "triton":
        from . import triton
        return triton.call(seen, x, kernels, theta, False)
    if theta is not None:
        kernels = reference.inhibited(kernels, theta)
    implementation = {"reference": reference, "grouped": grouped, "positions_first": positions_first}[chosen]
    return implementation.depthwise_dynamic_conv2d(x, kernels)


@remembered
def _chosen(x: Tensor, kernels: Tensor, theta: Tensor | None, backend: str | None) -> str:
    check_tensors("depthwise_dynamic_conv2d", ("theta",), True, x=(x, "B, C, H, W"), kernels=(kernels, "B, C, k, k"), theta=(theta, "C?"))
    if kernels.shape[:2] != x.shape[:2]:
        raise ValueError(f"depthwise_dynamic_conv2d: kernels must be (B, C, k, k) with the B and C of x {tuple(x.shape)}, "
                         f"got {tuple(kernels.shape)}")
    if kernels.shape[2] % 2 == 0 or kernels.shape[3] % 2 == 0:
        raise ValueError(f"depthwise_dynamic_conv2d: kernels must have odd sides, got {tuple(kernels.shape[2:])}")
    if theta is not None and theta.shape != x.shape[1:2]:
        raise ValueError(f"depthwise_dynamic_conv2d: theta must be (C,) = ({x.shape[1]},), got {tuple(theta.shape)}")
    exported = "grouped" if isinstance(x.shape[0], int) and x.shape[0] else "reference"
    return choose("depthwise_dynamic_conv2d", backend, x, lambda: _fastest(x), exported, {
        "triton": lambda: too_large(span(x)), "grouped": lambda: _no_groups(x), "positions_first": lambda: _no_groups(x)})


def _fastest(x: Tensor) -> str:
    if x.shape[0] == 0:
        return "reference"
    return "grouped" if x.is_contiguous() or x.stride(1) != 1 else "positions_first"


def _no_groups(x: Tensor) -> str | None:
    return None if x.shape[0] else "samples are groups of a convolution, and there is none"
