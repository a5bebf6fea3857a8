"""Deformable convolution as an implicit matrix product in Triton: samples are taken where they are multiplied, never stored.

A program holds a tile of output positions of one image and walks over the reduction in tiles of taps × channels. The channels of
a tile share their offsets and their group: tiles lie within segments of gcd(C / groups, C / offset groups) channels. Samples are
interpolated in float32 and multiplied in the dtype of x; sums are float32.

Backward there are two kernels. One makes the gradient of the samples, tile by tile, and from it those of x, offset and mask; the
other samples again for the gradient of the weight, whose partial sums over positions are added in a fixed order. The gradient of
x is scattered with atomic additions: of floats, in any order, or, where `torch.use_deterministic_algorithms` asks for it, of
fixed-point integers, whose sum has no order.
"""
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import name_of, register_gradient
from .._launch import Prepared, float32_precision, planned
from .._tiles import kernel
from . import reference

WIDE = 16  # channels of a segment that fill a tile for matrix units
WEIGHT_PROGRAMS = 1024  # the gradient of the weight is split over positions until there are about as many


@triton.jit
def _split(place, length):
    """Places on an axis → the pixel before each, whether that one and the next lie on the map, and the share of the next."""
    place = tl.where(place > -2, place, -2.0)  # also where undefined
    place = tl.where(place < length + 1, place, length + 1.0)
    before = tl.floor(place)
    share = place - before
    before = before.to(tl.int32)
    return before, (before >= 0) & (before < length), (before >= -1) & (before < length - 1), share


@triton.jit
def _places(
    offset, mask, offset_group, taps, i, j, on, height, width, offset_channel, mask_channel, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
):
    """Where the taps (T, 1, 1) at output positions (1, 1, P) sample, per axis as in `_split`, and the factor of the samples."""
    wanted = on & (taps < KH * KW)
    channel = offset_group * (KH * KW) + taps
    dy = tl.load(offset + 2 * channel * offset_channel, mask=wanted, other=0.0).to(tl.float32)
    dx = tl.load(offset + (2 * channel + 1) * offset_channel, mask=wanted, other=0.0).to(tl.float32)
    factor = 1.0
    if mask is not None:
        factor = tl.load(mask + channel * mask_channel, mask=wanted, other=0.0).to(tl.float32)
    y, top, bottom, fy = _split((i * SY - PY + taps // KW * DY).to(tl.float32) + dy, height)
    x, left, right, fx = _split((j * SX - PX + taps % KW * DX).to(tl.float32) + dx, width)
    return y, top & wanted, bottom & wanted, fy, x, left, right, fx, factor


@triton.jit
def _corners(image, y, top, bottom, x, left, right, wanted, x_row, x_column):
    """The four pixels around each sample in float32, zero off the map."""
    at = image + (y * x_row + x * x_column)
    return (
        tl.load(at, mask=top & left & wanted, other=0.0).to(tl.float32),
        tl.load(at + x_column, mask=top & right & wanted, other=0.0).to(tl.float32),
        tl.load(at + x_row, mask=bottom & left & wanted, other=0.0).to(tl.float32),
        tl.load(at + (x_row + x_column), mask=bottom & right & wanted, other=0.0).to(tl.float32),
    )


@triton.jit
def _between(a, b, share):
    return (1 - share) * a + share * b


@triton.jit
def _tile(index, out_height, out_width, POSITIONS: tl.constexpr):
    """Image, rows and columns of a tile of output positions, and which of them there are. Tiles are counted image by image."""
    tiles = tl.cdiv(out_height * out_width, POSITIONS)
    place = index % tiles * POSITIONS + tl.arange(0, POSITIONS)
    return (index // tiles).to(tl.int64), place // out_width, place % out_width, place < out_height * out_width


@kernel
def deform_conv2d_forward(
    x, offset, mask, weight, bias, out, height, width, out_height, out_width,
    x_batch, x_channel, x_row, x_column, offset_batch, offset_channel, offset_row, offset_column,
    mask_batch, mask_channel, mask_row, mask_column, out_batch, out_channel, out_row, out_column,
    GROUP: tl.constexpr, OUT_GROUP: tl.constexpr, OFFSET_GROUP: tl.constexpr, SEGMENT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr, OUTS: tl.constexpr, POSITIONS: tl.constexpr,
):
    """One program per tile of positions, TOGETHER groups, and tile of their output channels. The weight is (groups, kh·kw, C, Co)."""
    batch, i, j, on = _tile(tl.program_id(0), out_height, out_width, POSITIONS)
    group, o = tl.program_id(1) * TOGETHER, tl.program_id(2) * OUTS + tl.arange(0, OUTS)
    x += batch * x_batch + group * GROUP * x_channel
    offset += batch * offset_batch + (i * offset_row + j * offset_column)[None, None, :]
    if mask is not None:
        mask += batch * mask_batch + (i * mask_row + j * mask_column)[None, None, :]
    weight += group * (KH * KW * GROUP * OUT_GROUP) + o[:, None]
    tap_of, channel_of = tl.arange(0, TAPS * CHANNELS) // CHANNELS, tl.arange(0, TAPS * CHANNELS) % CHANNELS
    totals = ()
    for _ in tl.static_range(TOGETHER):
        totals += (tl.zeros((OUTS, POSITIONS), tl.float32),)
    for first in range(0, GROUP, SEGMENT):
        offset_group = (group * GROUP + first) // OFFSET_GROUP
        for tap in range(0, KH * KW, TAPS):
            t = tap + tl.arange(0, TAPS)[:, None, None]
            y, top, bottom, fy, z, left, right, fx, factor = _places(
                offset, mask, offset_group, t, i[None, None, :], j[None, None, :], on[None, None, :], height, width,
                offset_channel, mask_channel, KH, KW, SY, SX, PY, PX, DY, DX)
            for channel in range(0, SEGMENT, CHANNELS):
                c = channel + tl.arange(0, CHANNELS)[None, :, None]
                there = (tap + tap_of < KH * KW) & (channel + channel_of < SEGMENT) & (o < OUT_GROUP)[:, None]
                added = ()
                for g in tl.static_range(TOGETHER):
                    v00, v01, v10, v11 = _corners(
                        x + (g * GROUP + first + c) * x_channel, y, top, bottom, z, left, right, c < SEGMENT, x_row, x_column)
                    samples = factor * _between(_between(v00, v01, fx), _between(v10, v11, fx), fy)
                    columns = tl.reshape(samples, (TAPS * CHANNELS, POSITIONS)).to(weight.dtype.element_ty)
                    row = (g * KH * KW + tap + tap_of) * GROUP + first + channel + channel_of
                    kernel = tl.load(weight + row * OUT_GROUP, mask=there, other=0.0)
                    added += (tl.dot(kernel, columns, totals[g], input_precision=PRECISION),)
                totals = added
    out += batch * out_batch + i * out_row + j * out_column
    for g in tl.static_range(TOGETHER):
        total, channel = totals[g], (group + g) * OUT_GROUP + o
        if bias is not None:
            total += tl.load(bias + channel, mask=o < OUT_GROUP, other=0.0).to(tl.float32)[:, None]
        tl.store(out + channel[:, None] * out_channel, total, mask=(o < OUT_GROUP)[:, None] & on)


@kernel
def deform_conv2d_backward_samples(
    grad, x, offset, mask, weight, scale, grad_x, grad_offset, grad_mask, height, width, out_height, out_width,
    grad_batch, grad_channel, grad_row, grad_column, x_batch, x_channel, x_row, x_column,
    offset_batch, offset_channel, offset_row, offset_column, mask_batch, mask_channel, mask_row, mask_column,
    GROUP: tl.constexpr, OUT_GROUP: tl.constexpr, OFFSET_GROUP: tl.constexpr, SEGMENT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PRECISION: tl.constexpr,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, OUTS: tl.constexpr, POSITIONS: tl.constexpr,
):
    """One program per tile of positions, tile of taps, and offset group.

    grad_x has the strides of x; it is float32, or int64 where `scale` (1,) says how many units are one. grad_offset and grad_mask
    are contiguous.
    """
    batch, i, j, on = _tile(tl.program_id(0), out_height, out_width, POSITIONS)
    t, offset_group = tl.program_id(1) * TAPS + tl.arange(0, TAPS), tl.program_id(2)
    grad += batch * grad_batch + (i * grad_row + j * grad_column)
    x += batch * x_batch
    grad_x += batch * x_batch
    offset += batch * offset_batch + (i * offset_row + j * offset_column)[None, None, :]
    if mask is not None:
        mask += batch * mask_batch + (i * mask_row + j * mask_column)[None, None, :]
    y, top, bottom, fy, z, left, right, fx, factor = _places(
        offset, mask, offset_group, t[:, None, None], i[None, None, :], j[None, None, :], on[None, None, :], height, width,
        offset_channel, mask_channel, KH, KW, SY, SX, PY, PX, DY, DX)
    tap_of = tl.program_id(1) * TAPS + tl.arange(0, TAPS * CHANNELS) // CHANNELS
    channel_of = tl.arange(0, TAPS * CHANNELS) % CHANNELS
    grad_y = tl.zeros((TAPS, POSITIONS), tl.float32)
    grad_z = tl.zeros((TAPS, POSITIONS), tl.float32)
    grad_factor = tl.zeros((TAPS, POSITIONS), tl.float32)
    for first in range(offset_group * OFFSET_GROUP, (offset_group + 1) * OFFSET_GROUP, SEGMENT):
        group = first // GROUP
        for channel in range(0, SEGMENT, CHANNELS):
            row = (group * KH * KW + tap_of) * GROUP + first % GROUP + channel + channel_of
            there = (tap_of < KH * KW) & (channel + channel_of < SEGMENT)
            total = tl.zeros((TAPS * CHANNELS, POSITIONS), tl.float32)
            for out in range(0, OUT_GROUP, OUTS):
                o = out + tl.arange(0, OUTS)
                kernel = tl.load(weight + row[:, None] * OUT_GROUP + o, mask=there[:, None] & (o < OUT_GROUP), other=0.0)
                above = tl.load(grad + (group * OUT_GROUP + o)[:, None] * grad_channel, mask=(o < OUT_GROUP)[:, None] & on, other=0.0)
                total = tl.dot(kernel, above.to(kernel.dtype), total, input_precision=PRECISION)
            grad_samples = tl.reshape(total, (TAPS, CHANNELS, POSITIONS))
            c = channel + tl.arange(0, CHANNELS)[None, :, None]
            v00, v01, v10, v11 = _corners(x + (first + c) * x_channel, y, top, bottom, z, left, right, c < SEGMENT, x_row, x_column)
            upper, lower = _between(v00, v01, fx), _between(v10, v11, fx)
            if mask is not None:
                grad_factor += tl.sum(grad_samples * _between(upper, lower, fy), 1)
            grad_samples *= factor
            grad_y += tl.sum(grad_samples * (lower - upper), 1)
            grad_z += tl.sum(grad_samples * _between(v01 - v00, v11 - v10, fy), 1)
            if scale is not None:
                grad_samples *= tl.load(scale)
            at = grad_x + (first + c) * x_channel + (y * x_row + z * x_column)
            _scatter(at, grad_samples * ((1 - fy) * (1 - fx)), top & left & (c < SEGMENT))
            _scatter(at + x_column, grad_samples * ((1 - fy) * fx), top & right & (c < SEGMENT))
            _scatter(at + x_row, grad_samples * (fy * (1 - fx)), bottom & left & (c < SEGMENT))
            _scatter(at + (x_row + x_column), grad_samples * (fy * fx), bottom & right & (c < SEGMENT))
    channel = (batch * tl.num_programs(2) + offset_group) * (KH * KW) + t[:, None]
    place, there = i * out_width + j, (t < KH * KW)[:, None] & on
    tl.store(grad_offset + 2 * channel * (out_height * out_width) + place, grad_y, mask=there)
    tl.store(grad_offset + (2 * channel + 1) * (out_height * out_width) + place, grad_z, mask=there)
    if mask is not None:
        tl.store(grad_mask + channel * (out_height * out_width) + place, grad_factor, mask=there)


@triton.jit
def _scatter(at, values, wanted):
    tl.atomic_add(at, values.to(at.dtype.element_ty), mask=wanted, sem="relaxed")


@kernel
def deform_conv2d_backward_weight(
    grad, x, offset, mask, partial, height, width, out_height, out_width, images,
    grad_batch, grad_channel, grad_row, grad_column, x_batch, x_channel, x_row, x_column,
    offset_batch, offset_channel, offset_row, offset_column, mask_batch, mask_channel, mask_row, mask_column,
    GROUP: tl.constexpr, OUT_GROUP: tl.constexpr, OFFSET_GROUP: tl.constexpr, SEGMENT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PRECISION: tl.constexpr,
    TOGETHER: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr, OUTS: tl.constexpr, POSITIONS: tl.constexpr,
):
    """One program per share of the tiles of positions, tile of the reduction, and TOGETHER groups and tile of their output channels.

    `partial` is (shares, groups, kh·kw, C, Co).
    """
    per_segment, out_tiles = tl.cdiv(SEGMENT, CHANNELS), tl.cdiv(OUT_GROUP, OUTS)
    per_tap, part = per_segment * (GROUP // SEGMENT), tl.program_id(1)
    group, o = tl.program_id(2) // out_tiles * TOGETHER, tl.program_id(2) % out_tiles * OUTS + tl.arange(0, OUTS)
    tap, first, channel = part // per_tap * TAPS, part % per_tap // per_segment * SEGMENT, part % per_segment * CHANNELS
    offset_group = (group * GROUP + first) // OFFSET_GROUP
    t, c = tap + tl.arange(0, TAPS)[:, None, None], channel + tl.arange(0, CHANNELS)[None, :, None]
    totals = ()
    for _ in tl.static_range(TOGETHER):
        totals += (tl.zeros((OUTS, TAPS * CHANNELS), tl.float32),)
    for tile in range(tl.program_id(0), images * tl.cdiv(out_height * out_width, POSITIONS), tl.num_programs(0)):
        batch, i, j, on = _tile(tile, out_height, out_width, POSITIONS)
        y, top, bottom, fy, z, left, right, fx, factor = _places(
            offset + batch * offset_batch + (i * offset_row + j * offset_column)[None, None, :],
            None if mask is None else mask + batch * mask_batch + (i * mask_row + j * mask_column)[None, None, :],
            offset_group, t, i[None, None, :], j[None, None, :], on[None, None, :], height, width,
            offset_channel, mask_channel, KH, KW, SY, SX, PY, PX, DY, DX)
        added = ()
        for g in tl.static_range(TOGETHER):
            v00, v01, v10, v11 = _corners(x + batch * x_batch + ((group + g) * GROUP + first + c) * x_channel,
                                          y, top, bottom, z, left, right, c < SEGMENT, x_row, x_column)
            samples = factor * _between(_between(v00, v01, fx), _between(v10, v11, fx), fy)
            columns = tl.reshape(samples, (TAPS * CHANNELS, POSITIONS)).to(x.dtype.element_ty)
            at = grad + batch * grad_batch + ((group + g) * OUT_GROUP + o)[:, None] * grad_channel + i * grad_row + j * grad_column
            above = tl.load(at, mask=(o < OUT_GROUP)[:, None] & on, other=0.0).to(x.dtype.element_ty)
            added += (tl.dot(above, tl.trans(columns), totals[g], input_precision=PRECISION),)
        totals = added
    tap_of, channel_of = tap + tl.arange(0, TAPS * CHANNELS) // CHANNELS, channel + tl.arange(0, TAPS * CHANNELS) % CHANNELS
    groups = tl.num_programs(2) // out_tiles * TOGETHER
    for g in tl.static_range(TOGETHER):
        row = (tl.program_id(0) * groups + group + g) * (KH * KW) + tap_of
        at = partial + (row.to(tl.int64) * GROUP + first + channel_of) * OUT_GROUP + o[:, None]
        tl.store(at, totals[g], mask=(tap_of < KH * KW) & (channel_of < SEGMENT) & (o < OUT_GROUP)[:, None])


def _problem(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *geometry: Sequence[int]) -> dict[str, Any]:
    """Arguments that all kernels share, but for tensors."""
    (out_channels, group_width, kh, kw), offset_groups = weight.shape, offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    (sy, sx), (py, px), (dy, dx) = geometry
    offset_group = x.shape[1] // offset_groups
    return dict(
        height=x.shape[2], width=x.shape[3], out_height=offset.shape[2], out_width=offset.shape[3],
        **_strides("x", x), **_strides("offset", offset), **_strides("mask", mask),
        GROUP=group_width, OUT_GROUP=out_channels * group_width // x.shape[1], OFFSET_GROUP=offset_group,
        SEGMENT=math.gcd(group_width, offset_group), KH=kh, KW=kw, SY=sy, SX=sx, PY=py, PX=px, DY=dy, DX=dx,
        PRECISION=float32_precision(x.device),
    )


def _together(problem: dict[str, Any], most: int, widest: int) -> int:
    """Groups that share their offsets, and for which a program works out places and shares once; 1 where they are wider."""
    if problem["SEGMENT"] > widest or problem["OFFSET_GROUP"] % problem["GROUP"]:
        return 1
    return math.gcd(most, problem["OFFSET_GROUP"] // problem["GROUP"])


@planned
def _forward_plan(
    x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, out: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Prepared:
    problem = _problem(x, offset, weight, mask, stride, padding, dilation)
    positions, groups, together = out.shape[2] * out.shape[3], x.shape[1] // weight.shape[1], _together(problem, 8 // x.itemsize, WIDE - 1)
    return Prepared(
        deform_conv2d_forward, x.device,
        lambda chosen: (out.shape[0] * triton.cdiv(positions, chosen["POSITIONS"]), groups // together,
                        triton.cdiv(problem["OUT_GROUP"], chosen["OUTS"])),
        _key(x, problem), ("x", "offset", "mask", "weight", "bias", "out"), **problem, **_strides("out", out),
        TOGETHER=together)


@planned
def _backward_plan(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Prepared, Prepared, tuple[int, ...]]:
    """Of the gradients of x, offset and mask, and of the weight's partial sums, and their shape."""
    problem = _problem(x, offset, weight, mask, stride, padding, dilation) | _strides("grad", grad)
    groups, offset_groups = x.shape[1] // weight.shape[1], x.shape[1] // problem["OFFSET_GROUP"]
    # The weight's sums of several wider groups take too many registers.
    together = _together(problem, 8 // x.itemsize, 1)
    images, positions, taps = x.shape[0], grad.shape[2] * grad.shape[3], problem["KH"] * problem["KW"]
    shares = min(images * triton.cdiv(positions, 64), max(1, WEIGHT_PROGRAMS * 64 * 32 // weight.numel()))

    def weight_grid(chosen: dict[str, Any]) -> tuple[int, ...]:
        reductions = triton.cdiv(taps, chosen["TAPS"]) * (problem["GROUP"] // problem["SEGMENT"])
        return (shares, reductions * triton.cdiv(problem["SEGMENT"], chosen["CHANNELS"]),
                groups // together * triton.cdiv(problem["OUT_GROUP"], chosen["OUTS"]))

    maps = "grad", "x", "offset", "mask"
    return (
        Prepared(deform_conv2d_backward_samples, x.device,
                 lambda chosen: (images * triton.cdiv(positions, chosen["POSITIONS"]), triton.cdiv(taps, chosen["TAPS"]), offset_groups),
                 _key(x, problem), (*maps, "weight", "scale", "grad_x", "grad_offset", "grad_mask"), **problem),
        Prepared(deform_conv2d_backward_weight, x.device, weight_grid, _key(x, problem), (*maps, "partial"), **problem, images=images,
                 TOGETHER=together),
        (shares, groups, taps, problem["GROUP"], problem["OUT_GROUP"]))


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    return {f"{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate(("batch", "channel", "row", "column"))}


def _key(x: Tensor, problem: dict[str, Any]) -> str:
    """How wide a tile of channels can be, and the size of the dtype."""
    width = "depthwise" if problem["SEGMENT"] == 1 else "narrow" if problem["SEGMENT"] < WIDE else "wide"
    return f"{width} {8 * x.itemsize}-bit"


def _by_group(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(Co, C / groups, kh, kw) → (groups, kh·kw, C / groups, Co / groups), contiguous."""
    return weight.to(dtype).reshape(groups, -1, weight.shape[1], weight.shape[2] * weight.shape[3]).permute(0, 3, 2, 1).contiguous()


@torch.library.custom_op("zoo::deform_conv2d_triton", mutates_args=())
def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:
    """See `zoo.kernels.deform_conv2d`. Any floating dtypes; products in that of x, which comes back."""
    out = _empty_out(x, offset, weight)
    if out.numel() == 0:
        return out
    plan = _forward_plan(x, offset, weight, mask, out, stride, padding, dilation)
    plan(x, offset, mask, _by_group(weight, x.shape[1] // weight.shape[1], x.dtype), bias, out)
    return out


@deform_conv2d.register_fake
def _(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:
    return _empty_out(x, offset, weight)


def _empty_out(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """In the memory format of x."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(x.shape[0], weight.shape[0], *offset.shape[2:], dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.library.custom_op("zoo::deform_conv2d_triton_backward", mutates_args=())
def deform_conv2d_backward(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, offset, weight, bias and mask (of no elements where there is none)."""
    if grad.numel() == 0:
        grad_x, grad_offset, grad_weight, grad_bias, grad_mask = map(torch.zeros_like, _empty_grads(x, offset, weight, bias, mask))
        return grad_x, grad_offset, grad_weight, grad_bias, grad_mask
    grad_x, grad_offset, *_, grad_mask = _empty_grads(x, offset, weight, bias, mask)
    if grad_x.stride() != x.stride():
        x = grad_x.copy_(x)  # the kernel addresses both alike
    of_samples, of_weight, shape = _backward_plan(grad, x, offset, weight, mask, stride, padding, dilation)
    groups, samples = shape[1], shape[2] * grad.shape[2] * grad.shape[3]
    scale = _units(grad, weight, mask, groups, samples) if torch.are_deterministic_algorithms_enabled() else None
    sums = torch.zeros_like(x, dtype=torch.float32 if scale is None else torch.int64)
    of_samples(grad, x, offset, mask, _by_group(weight, groups, x.dtype), scale, sums, grad_offset, grad_mask)
    grad_x = (sums if scale is None else sums / scale.double()).to(x.dtype)
    partial = x.new_empty(shape, dtype=torch.float32)
    of_weight(grad, x, offset, mask, partial)
    grad_weight = partial.sum(0).permute(0, 3, 2, 1).reshape(weight.shape).to(weight.dtype).contiguous()
    grad_bias = x.new_empty(0) if bias is None else grad.sum((0, 2, 3), dtype=bias.dtype)
    return grad_x, grad_offset, grad_weight, grad_bias, grad_mask


@deform_conv2d_backward.register_fake
def _(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(x, offset, weight, bias, mask)


def _empty_grads(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_offset, grad_weight, grad_bias, grad_mask = (
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (offset, weight, bias, mask))
    return torch.empty_like(x), grad_offset, grad_weight, grad_bias, grad_mask


def _units(grad: Tensor, weight: Tensor, mask: Tensor | None, groups: int, samples: int) -> Tensor:
    """How many units of 64-bit fixed point are one, so that the gradients of as many samples can meet in one pixel."""
    largest = torch.linalg.vector_norm(grad.float(), torch.inf) * weight.float().unflatten(0, (groups, -1)).abs().sum(1).amax()
    if mask is not None:
        largest *= torch.linalg.vector_norm(mask.float(), torch.inf)
    return 2.0 ** (61 - samples.bit_length()) / largest.clamp_min(2.0**-60).view(1)


call = register_gradient(deform_conv2d, deform_conv2d_backward, reference.deform_conv2d, reference.flops)


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels."""
    layers = {  # channels, output channels, groups, side of the kernel, stride, masked, memory format
        "das": (48, 256, 16, 3, 1, False, torch.contiguous_format),
        "merging": (96, 192, 1, 2, 2, False, torch.channels_last),
        "masked depthwise": (32, 32, 32, 3, 1, True, torch.contiguous_format),
    }
    for deterministic, dtype, (name, (channels, out_channels, groups, side, stride, masked, memory_format)) in itertools.product(
            (False, True), (torch.bfloat16, torch.float32), layers.items()):
        x, offset, mask = (torch.zeros(1, count, size, size, dtype=dtype).contiguous(memory_format=memory_format)
                           for count, size in ((channels, 16), (2 * side**2, 16 // stride), (side**2, 16 // stride)))
        weight = torch.zeros(out_channels, channels // groups, side, side, dtype=dtype)
        mask, geometry = mask if masked else None, ([stride, stride], [(side - stride) // 2] * 2, [1, 1])

        def run(x=x, offset=offset, weight=weight, mask=mask, geometry=geometry, deterministic=deterministic) -> None:
            out = deform_conv2d(x, offset, weight, None, mask, *geometry)
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(deterministic)
            try:
                deform_conv2d_backward(out, x, offset, weight, None, mask, *geometry)
            finally:
                torch.use_deterministic_algorithms(before)

        yield f"{name} {name_of(dtype)}{', deterministic' if deterministic else ''}", run
