"""Per-sample depthwise convolution in Triton, in any memory layout, and the gradient of its kernels.

Both are linear in their two maps, and each is the other's derivative, so that two operators make gradients of any order:

    conv(x, K)[p] = Σ_s K[s] x[p + s],  its kernels' gradient  corr(x, g)[s] = Σ_p g[p] x[p + s],

and their transposes, which go from p + s to p. The lateral inhibition is its own adjoint and is taken where kernels are read.
"""
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import Direct, name_of, observed, register_flops
from .._launch import Prepared, planned
from .._tiles import kernel
from .reference import flops

PROGRAMS = 2048  # the gradient of the kernels is split over positions until there are about as many


@triton.jit
def _position(p, u, v, height, width, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr):
    """Row and column of positions p on the flattened map, moved by place (u, v) of the kernel, and which of them are on the map."""
    i, j = p // width + SIGN * (u - KH // 2), p % width + SIGN * (v - KW // 2)
    return i, j, (p < height * width) & (i >= 0) & (i < height) & (j >= 0) & (j < width)


@kernel
def depthwise_dynamic_conv2d_forward(
    x, kernels, theta, out, channels, height, width, x_batch, x_channel, x_row, x_column, kernels_batch, kernels_channel, kernels_row,
    kernels_column, out_batch, out_channel, out_row, out_column, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One program per tile of positions, tile of channels, and sample."""
    batch = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    x += batch * x_batch + c * x_channel
    kernels += batch * kernels_batch + c * kernels_channel
    inhibition = tl.zeros((CHANNELS, 1), tl.float32)
    if theta is not None:
        for place in tl.static_range(KH * KW):
            at = kernels + place // KW * kernels_row + place % KW * kernels_column
            inhibition += tl.load(at, mask=c < channels, other=0.0).to(tl.float32)
        inhibition *= tl.sigmoid(tl.load(theta + c, mask=c < channels, other=0.0).to(tl.float32)) / (KH * KW)
    total = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    for place in tl.static_range(KH * KW):
        i, j, on = _position(p, place // KW, place % KW, height, width, KH, KW, SIGN)
        at = kernels + place // KW * kernels_row + place % KW * kernels_column
        weight = tl.load(at, mask=c < channels, other=0.0).to(tl.float32) - inhibition
        total += weight * tl.load(x + i * x_row + j * x_column, mask=on & (c < channels), other=0.0).to(tl.float32)
    out += batch * out_batch + c * out_channel + p // width * out_row + p % width * out_column
    tl.store(out, total, mask=(p < height * width) & (c < channels))


@kernel
def depthwise_dynamic_conv2d_backward_kernels(
    x, grad, partial, samples, channels, height, width, x_batch, x_channel, x_row, x_column, grad_batch, grad_channel, grad_row,
    grad_column, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One program per share of the tiles of positions, tile of channels, and sample; `partial` is (shares, B, C, kh·kw)."""
    batch = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    x += batch * x_batch + c * x_channel
    grad += batch * grad_batch + c * grad_channel
    partial += ((tl.program_id(0) * samples + batch) * channels + c) * (KH * KW)
    for u in tl.static_range(KH):  # a row of places at a time: of all, the sums take too many registers
        sums = ()
        for _ in tl.static_range(KW):
            sums += (tl.zeros((CHANNELS, POSITIONS), tl.float32),)
        for first in range(tl.program_id(0) * POSITIONS, height * width, tl.num_programs(0) * POSITIONS):
            p = first + tl.arange(0, POSITIONS)[None, :]
            i, j, on = p // width + SIGN * (u - KH // 2), p % width, (p < height * width) & (c < channels)
            above = tl.load(grad + p // width * grad_row + j * grad_column, mask=on, other=0.0).to(tl.float32)
            on &= (i >= 0) & (i < height)
            at, added = x + i * x_row + j * x_column, ()
            for v in tl.static_range(KW):
                move = SIGN * (v - KW // 2)
                there = on & (j + move >= 0) & (j + move < width)
                added += (sums[v] + above * tl.load(at + move * x_column, mask=there, other=0.0).to(tl.float32),)
            sums = added
        for v in tl.static_range(KW):
            tl.store(partial + (u * KW + v), tl.sum(sums[v], 1, keep_dims=True), mask=c < channels)


def _key(x: Tensor) -> str:
    """What lies innermost in memory, and how many positions there are."""
    return f"{'channels' if x.stride(1) == 1 else 'positions'} {'few' if x.shape[2] * x.shape[3] <= 256 else 'many'}"


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip(("batch", "channel", "row", "column"), x.stride(), strict=True)}


def _shape(x: Tensor, kernel_size: Sequence[int], transposed: bool) -> dict[str, Any]:
    channels, height, width = x.shape[1:]
    return dict(channels=channels, height=height, width=width, KH=kernel_size[0], KW=kernel_size[1], SIGN=-1 if transposed else 1)


@planned
def _convolution(x: Tensor, kernels: Tensor, theta: Tensor | None, out: Tensor, transposed: bool) -> Prepared:
    b, c, height, width = x.shape
    return Prepared(
        depthwise_dynamic_conv2d_forward, x.device,
        lambda chosen: (triton.cdiv(height * width, chosen["POSITIONS"]), triton.cdiv(c, chosen["CHANNELS"]), b), _key(x),
        ("x", "kernels", "theta", "out"), **_shape(x, kernels.shape[2:], transposed), **_strides("x", x), **_strides("kernels", kernels),
        **_strides("out", out))


@planned
def _correlation(x: Tensor, grad: Tensor, kernel_size: Sequence[int], transposed: bool) -> tuple[Prepared, tuple[int, ...]]:
    """Also the shape of the partial sums."""
    b, c, height, width = x.shape
    shares = max(1, min(triton.cdiv(height * width, 1024), PROGRAMS // max(1, b * triton.cdiv(c, 8))))
    prepared = Prepared(
        depthwise_dynamic_conv2d_backward_kernels, x.device, lambda chosen: (shares, triton.cdiv(c, chosen["CHANNELS"]), b), _key(x),
        ("x", "grad", "partial"), samples=b, **_shape(x, kernel_size, transposed), **_strides("x", x), **_strides("grad", grad))
    return prepared, (shares, b, c, *kernel_size)


@torch.library.custom_op("zoo::depthwise_dynamic_conv2d_triton", mutates_args=())
def depthwise_dynamic_conv2d(x: Tensor, kernels: Tensor, theta: Tensor | None, transposed: bool) -> Tensor:
    """conv(x, kernels, inhibited where there is a theta) or its transpose, in the dtype and layout of x."""
    out = torch.empty_like(x)
    if x.numel():
        _convolution(x, kernels, theta, out, transposed)(x, kernels, theta, out)
    return out


@depthwise_dynamic_conv2d.register_fake
def _(x: Tensor, kernels: Tensor, theta: Tensor | None, transposed: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("zoo::depthwise_dynamic_conv2d_triton_kernels", mutates_args=())
def gradient_of_kernels(x: Tensor, grad: Tensor, kernel_size: list[int], transposed: bool) -> Tensor:
    """corr(x, grad) or its transpose, (B, C, kh, kw) in float32."""
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:2], *kernel_size, dtype=torch.float32)
    run, shape = _correlation(x, grad, kernel_size, transposed)
    partial = x.new_empty(shape, dtype=torch.float32)
    run(x, grad, partial)
    return partial[0] if shape[0] == 1 else partial.sum(0)


@gradient_of_kernels.register_fake
def _(x: Tensor, grad: Tensor, kernel_size: list[int], transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:2], *kernel_size, dtype=torch.float32)


def _setup_conv(ctx, inputs: tuple, output: Tensor) -> None:
    x, kernels, theta, ctx.transposed = inputs
    ctx.save_for_backward(x, kernels, theta)


def _conv_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, kernels, theta = ctx.saved_tensors
    seen = observed((grad, x, kernels, theta))
    grad_x = call(seen, grad, kernels, theta, not ctx.transposed)
    grad_kernels, grad_theta = call_gradient(seen, x, grad, list(kernels.shape[2:]), ctx.transposed), None
    if theta is not None:
        share, grad_means = theta.float().sigmoid(), grad_kernels.mean((2, 3), keepdim=True)
        along = (kernels.sum((2, 3), dtype=torch.float32, keepdim=True) * grad_means).sum((0, 2, 3))
        grad_theta = (along * (share - 1) * share).to(theta.dtype)
        grad_kernels = torch.addcmul(grad_kernels, share[:, None, None], grad_means, value=-1)
    return grad_x.to(x.dtype), grad_kernels.to(kernels.dtype), grad_theta, None


depthwise_dynamic_conv2d.register_autograd(_conv_backward, setup_context=_setup_conv)
call = Direct(depthwise_dynamic_conv2d, _setup_conv, _conv_backward)


def _setup_kernels(ctx, inputs: tuple, output: Tensor) -> None:
    x, grad, _, ctx.transposed = inputs
    ctx.save_for_backward(x, grad)


def _kernels_backward(ctx, grad_kernels: Tensor) -> tuple[Tensor | None, ...]:
    x, grad = ctx.saved_tensors
    seen = observed((x, grad, grad_kernels))
    return call(seen, grad, grad_kernels, None, not ctx.transposed), call(seen, x, grad_kernels, None, ctx.transposed), None, None


gradient_of_kernels.register_autograd(_kernels_backward, setup_context=_setup_kernels)
call_gradient = Direct(gradient_of_kernels, _setup_kernels, _kernels_backward)


register_flops(depthwise_dynamic_conv2d, lambda x, kernels, *_, **__: flops(x, kernels))
register_flops(gradient_of_kernels, lambda x, grad, kernel_size, *_, **__: flops(x, (*x[:2], *kernel_size)))


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels."""
    for dtype, side, memory_format in (
        (torch.float32, 56, torch.contiguous_format), (torch.bfloat16, 56, torch.contiguous_format),
        (torch.bfloat16, 7, torch.contiguous_format), (torch.bfloat16, 56, torch.channels_last),
    ):
        x = torch.zeros(2, 64, side, side, dtype=dtype).contiguous(memory_format=memory_format)
        kernels, theta = torch.zeros(2, 64, 3, 3, dtype=dtype), torch.zeros(64, dtype=dtype)

        def run(x=x, kernels=kernels, theta=theta) -> None:
            depthwise_dynamic_conv2d(x, kernels, theta, False)
            gradient_of_kernels(x, x, [3, 3], False)

        yield f"{_key(x)} {name_of(dtype)}", run
