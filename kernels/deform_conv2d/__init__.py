import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torchvision import ops

from .._backends import Backend, use_triton
from .._exporting import is_exporting
from .._layout import span, too_large
from . import blocked, reference

__all__ = ["deform_conv2d", "spelled_out_in_exports"]

_spelled_out: ContextVar[bool] = ContextVar("spelled_out", default=False)


@contextlib.contextmanager
def spelled_out_in_exports() -> Iterator[None]:
    """Graphs exported inside hold `grid_sample` and a matrix product, which ONNX has since opset 16, instead of the operator."""
    token = _spelled_out.set(True)
    try:
        yield
    finally:
        _spelled_out.reset(token)


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
    backend: Backend | None = None,
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
        backend: "reference" or "triton"; default what suits the device, see `zoo.kernels`.

    Returns:
        (B, Co, Ho, Wo) in the dtype and memory layout (contiguous or channels-last) of x. Differentiable once in x, offset,
        weight, bias and mask.

    The Triton kernels never store a sample: they take it where it is multiplied, in the dtype of x (under autocast in its dtype,
    as convolutions do, where the reference has float32), and again in the backward pass, whose only sums in no fixed order are
    those of the gradient of x, and not even they under `torch.use_deterministic_algorithms`. The reference on the CPU holds the
    samples of some images or rows at a time, fastest in channels-last memory where there is one group of each kind; on other
    devices it is torchvision's operator. So it is in exported graphs, which ONNX then shows as `DeformConv` (opset 19), unless
    exported within `spelled_out_in_exports`.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    stride, padding, dilation = (tuple(p) if isinstance(p, (tuple, list)) else (p, p) for p in (stride, padding, dilation))
    _check(x, offset, weight, bias, mask, stride, padding, dilation)
    if use_triton("deform_conv2d", backend, x,
                  lambda: too_large(span(x), span(offset), weight.shape[0] * offset.shape[2] * offset.shape[3])):
        from .triton import deform_conv2d as compute
        if torch.is_autocast_enabled(x.device.type):
            samples = x.to(torch.get_autocast_dtype(x.device.type))
            return compute(samples, offset, weight, bias, mask, stride, padding, dilation).to(x.dtype)
    elif is_exporting():
        compute = reference.deform_conv2d if _spelled_out.get() else _torchvision
    else:
        compute = blocked.deform_conv2d if x.device.type == "cpu" else _torchvision
    return compute(x, offset, weight, bias, mask, stride, padding, dilation)


def _torchvision(x, offset, weight, bias, mask, stride, padding, dilation) -> Tensor:
    inner = torch.promote_types(x.dtype, torch.float32)
    upcast = (t if t is None else t.to(inner) for t in (x, offset, weight, bias))
    return ops.deform_conv2d(*upcast, stride, padding, dilation, mask if mask is None else mask.to(inner)).to(x.dtype)


def _check(x, offset, weight, bias, mask, stride, padding, dilation) -> None:
    tensors = {name: t for name, t in dict(x=x, offset=offset, weight=weight, bias=bias, mask=mask).items() if t is not None}
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise TypeError(f"deform_conv2d: {name} must be of a floating dtype, got {t.dtype}")
        if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"deform_conv2d: {name} must have the dtype of x ({x.dtype}), got {t.dtype}")
        if t.ndim != (1 if name == "bias" else 4):
            raise ValueError(f"deform_conv2d: {name} must have {1 if name == 'bias' else 4} dimensions, got shape {tuple(t.shape)}")
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError("deform_conv2d: stride and dilation must be at least 1 and padding at least 0, "
                         f"got {stride}, {dilation} and {padding}")
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
    if tuple(offset.shape[2:]) != out_size or offset.shape[0] != b:
        raise ValueError(f"deform_conv2d: offset must be ({b}, …, {out_size[0]}, {out_size[1]}), got shape {tuple(offset.shape)}")
    if mask is not None and tuple(mask.shape) != (b, offset.shape[1] // 2, *out_size):
        raise ValueError(f"deform_conv2d: mask must be {(b, offset.shape[1] // 2, *out_size)}, got shape {tuple(mask.shape)}")
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(f"deform_conv2d: bias must be ({out_channels},), got shape {tuple(bias.shape)}")
