import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from .._backends import autocasting, choose, observed, public_operator, remembered
from .._checking import check_tensors, check_whole, pair
from .._exporting import is_exporting, known
from .._layout import span, too_large
from . import gathered, grid_sampled, reference, sampled, torchvision

__all__ = ["deform_conv2d", "spelled_out_in_exports"]

FEWEST_CHANNELS = 64  # in a row that is worth gathering

_spelled_out: ContextVar[bool] = ContextVar("spelled_out", default=False)


@contextlib.contextmanager
def spelled_out_in_exports() -> Iterator[None]:
    """Graphs exported inside hold `grid_sample` and a matrix product, which ONNX has since opset 16, instead of the operator."""
    token = _spelled_out.set(True)
    try:
        yield
    finally:
        _spelled_out.reset(token)


@public_operator
def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution whose taps sample the map away from their places (arXiv 1703.06211; with `mask` 1811.11168).

        out[o, p] = bias[o] + Σ_{c, k} weight[o, c, k] · mask[k, p] · x[c, p·stride − padding + k·dilation + offset[k, p]]

    x is interpolated bilinearly between pixels, with zeros outside the map. The groups of the convolution follow from
    the shapes of x and weight, the groups of channels that share their offsets from those of offset and weight.
    Values and gradients are those of `torchvision.ops.deform_conv2d`, also where a sample lies on a pixel (the derivative
    with respect to its place is the right-hand one) and on the edge of the map.

    Args:
        x: (B, C, H, W). float32, float64, float16, bfloat16; computed in at least float32.
        offset: (B, offset groups·kh·kw·2, Ho, Wo), the row before the column of every tap.
        weight: (Co, C / groups, kh, kw).
        bias: (Co,).
        stride, padding, dilation: one number, or one each for rows and columns.
        mask: (B, offset groups·kh·kw, Ho, Wo), factors of the samples; default 1.
        backend: "reference" (all samples by index), "grid_sampled" (by one `grid_sample`), "torchvision", on the CPU "gathered"
            (channels-last maps without groups, some samples at a time) and "sampled" (by `grid_sample`, some at a time), "pytorch"
            (which of them suits device and shapes), "triton"; default what suits the device, see `zoo.kernels`.

    Returns:
        (B, Co, Ho, Wo) in the dtype and memory layout (contiguous or channels-last) of x. Differentiable in x, offset, weight, bias
        and mask: any number of times, but by torchvision's operator once.

    The Triton kernels never store a sample: they take it where it is multiplied, in the dtype of x (under autocast in its dtype,
    as convolutions do, where the others have float32), and again in the backward pass, whose only sums in no fixed order are
    those of the gradient of x, and not even they under `torch.use_deterministic_algorithms`. PyTorch on the CPU holds the samples of
    some images or rows at a time, fastest in channels-last memory where there is one group of each kind; on other devices it is
    torchvision's operator. So it is in exported graphs, which ONNX then shows as `DeformConv` (opset 19), unless
    exported within `spelled_out_in_exports`.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    given = dict(stride=stride, padding=padding, dilation=dilation)
    geometry = [pair("deform_conv2d", name, p) if isinstance(p, (tuple, list)) else (p, p) for name, p in given.items()]
    seen = observed((x, offset, weight, bias, mask, backend))
    chosen = _chosen(seen, x, offset, weight, bias, mask, *geometry, backend)
    if chosen != "triton":
        ways = {"reference": reference, "grid_sampled": grid_sampled, "torchvision": torchvision, "sampled": sampled, "gathered": gathered}
        return ways[chosen].deform_conv2d(x, offset, weight, bias, mask, *geometry)
    from . import triton
    if not autocasting(x.device.type):
        return triton.call(seen, x, offset, weight, bias, mask, *geometry)
    return triton.call(seen, x.to(torch.get_autocast_dtype(x.device.type)), offset, weight, bias, mask, *geometry).to(x.dtype)


@remembered
def _chosen(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], backend: str | None,
) -> str:
    _check(x, offset, weight, bias, mask, stride, padding, dilation)
    return choose(
        "deform_conv2d", backend, x, lambda: _fastest(x, offset, weight),
        "grid_sampled" if is_exporting() and _spelled_out.get() else "torchvision",  # torch 2.11 cannot compile asking for the latter
        {"triton": lambda: too_large(span(x), span(offset), weight.shape[0] * offset.shape[2] * offset.shape[3]),
         "sampled": lambda: _elsewhere(x), "gathered": lambda: _elsewhere(x) or _in_groups(x, offset, weight)})


def _fastest(x: Tensor, offset: Tensor, weight: Tensor) -> str:
    if x.device.type != "cpu":
        return "torchvision"
    return "gathered" if x.shape[1] >= FEWEST_CHANNELS and _in_groups(x, offset, weight) is None else "sampled"


def _elsewhere(x: Tensor) -> str | None:
    return None if x.device.type == "cpu" else f"it is for the CPU, the tensors are on {x.device.type}"


def _in_groups(x: Tensor, offset: Tensor, weight: Tensor) -> str | None:
    one = x.shape[1] == weight.shape[1] and offset.shape[1] == 2 * weight.shape[2] * weight.shape[3]
    return None if one else "it takes one group of channels and of offsets only"


def _check(x, offset, weight, bias, mask, stride, padding, dilation) -> None:
    check_tensors("deform_conv2d", (), True, x=(x, "B, C, H, W"), offset=(offset, "B, offset groups·kh·kw·2, Ho, Wo"),
                  weight=(weight, "Co, C / groups, kh, kw"), bias=(bias, "Co?"), mask=(mask, "B, offset groups·kh·kw, Ho, Wo?"))
    for name, least, values in (("stride", 1, stride), ("padding", 0, padding), ("dilation", 1, dilation)):
        check_whole("deform_conv2d", name, least, *values)
    (b, channels, *size), (out_channels, group_width, *kernel) = x.shape, weight.shape
    groups = channels // max(1, group_width)
    if groups < 1 or groups * group_width != channels or out_channels % groups:
        raise ValueError(f"deform_conv2d: weight must be (Co, {channels} / groups, kh, kw) with groups dividing Co, "
                         f"got shape {tuple(weight.shape)}")
    per_group = 2 * kernel[0] * kernel[1]
    offset_groups = offset.shape[1] // per_group
    if offset_groups == 0 or offset_groups * per_group != offset.shape[1] or channels % offset_groups:
        raise ValueError(f"deform_conv2d: offset must have {per_group} channels for each of its groups, whose number divides {channels}, "
                         f"got {offset.shape[1]}")
    out_size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1
                     for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True))
    if any(known((n < 1,)) for n in out_size):
        raise ValueError(f"deform_conv2d: weight must have kernels that fit into x, {size[0]}×{size[1]} and padding {padding}, "
                         f"got {kernel[0]}×{kernel[1]} with dilation {dilation}")
    if tuple(offset.shape[2:]) != out_size or offset.shape[0] != b:
        raise ValueError(f"deform_conv2d: offset must be ({b}, …, {out_size[0]}, {out_size[1]}), got shape {tuple(offset.shape)}")
    if mask is not None and tuple(mask.shape) != (b, offset.shape[1] // 2, *out_size):
        raise ValueError(f"deform_conv2d: mask must be {(b, offset.shape[1] // 2, *out_size)}, got shape {tuple(mask.shape)}")
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(f"deform_conv2d: bias must be ({out_channels},), got shape {tuple(bias.shape)}")
