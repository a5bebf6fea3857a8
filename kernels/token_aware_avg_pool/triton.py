"""Token-aware average pooling in Triton: the pools of a tile are taken, weighted and added in registers."""
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import name_of, register_gradient
from .._launch import Prepared, planned
from .._tiles import kernel
from . import reference


@triton.jit
def _moved(i, j, place, dilation, height, width):
    """Row and column of positions moved by place (0 … 8) of a dilated 3×3 kernel, and which of them are on the map."""
    i, j = i + (place // 3 - 1) * dilation, j + (place % 3 - 1) * dilation
    return i, j, (i >= 0) & (i < height) & (j >= 0) & (j < width)


@kernel
def token_aware_avg_pool_forward(
    x, weights, out, height, width, channels, x_batch, x_row, x_column, x_channel, weights_batch, weights_row, weights_column,
    weights_pool, POOLS: tl.constexpr, TRANSPOSED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One program per tile of positions, tile of channels, and sample; `out` is contiguous.

    The pools of x are weighted where they are summed up or, transposed, where their values come from.
    """
    batch = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    i, j, on = p // width, p % width, p < height * width
    x += batch * x_batch + c * x_channel
    weights += batch * weights_batch
    here = weights + i * weights_row + j * weights_column
    total = tl.load(x + i * x_row + j * x_column, mask=on & (c < channels), other=0.0).to(tl.float32)
    total *= tl.load(here, mask=on, other=0.0).to(tl.float32)
    for k in range(1, POOLS):
        pool = tl.zeros((POSITIONS, CHANNELS), tl.float32)
        for place in tl.static_range(9):
            y, z, there = _moved(i, j, place, k, height, width)
            there &= on
            value = tl.load(x + y * x_row + z * x_column, mask=there & (c < channels), other=0.0).to(tl.float32)
            if TRANSPOSED:
                at = weights + y * weights_row + z * weights_column + k * weights_pool
                value *= tl.load(at, mask=there, other=0.0).to(tl.float32)
            pool += value
        if not TRANSPOSED:
            pool *= tl.load(here + k * weights_pool, mask=on, other=0.0).to(tl.float32)
        total += pool * (1 / 9)
    tl.store(out + (batch * height * width + p) * channels + c, total, mask=on & (c < channels))


@kernel
def token_aware_avg_pool_backward_weights(
    grad, x, grad_weights, height, width, channels, grad_batch, grad_row, grad_column, grad_channel, x_batch, x_row, x_column, x_channel,
    POOLS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One program per tile of positions, pool, and sample; grad_weights is contiguous."""
    batch, k = tl.program_id(2).to(tl.int64), tl.program_id(1)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    i, j, on = p // width, p % width, p < height * width
    grad += batch * grad_batch + i * grad_row + j * grad_column
    x += batch * x_batch
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)[None, :]
        pool = tl.zeros((POSITIONS, CHANNELS), tl.float32)
        if k == 0:
            pool += 9 * tl.load(x + i * x_row + j * x_column + c * x_channel, mask=on & (c < channels), other=0.0).to(tl.float32)
        else:
            for place in tl.static_range(9):
                y, z, there = _moved(i, j, place, k, height, width)
                pool += tl.load(x + y * x_row + z * x_column + c * x_channel, mask=there & on & (c < channels), other=0.0).to(tl.float32)
        total += pool * tl.load(grad + c * grad_channel, mask=on & (c < channels), other=0.0).to(tl.float32)
    at = grad_weights + (batch * height * width + p) * POOLS + k
    tl.store(at, tl.sum(total, 1, keep_dims=True) * (1 / 9), mask=on)


@planned
def _pooling(x: Tensor, weights: Tensor, transposed: bool) -> Prepared:
    b, height, width, channels = x.shape
    return Prepared(
        token_aware_avg_pool_forward, x.device,
        lambda chosen: (triton.cdiv(height * width, chosen["POSITIONS"]), triton.cdiv(channels, chosen["CHANNELS"]), b), "",
        ("x", "weights", "out"), height=height, width=width, channels=channels, POOLS=weights.shape[3], TRANSPOSED=transposed,
        **_strides("x", x, "channel"), **_strides("weights", weights, "pool"))


@planned
def _weighing(grad: Tensor, x: Tensor, weights: Tensor) -> Prepared:
    b, height, width, channels = x.shape
    return Prepared(
        token_aware_avg_pool_backward_weights, x.device,
        lambda chosen: (triton.cdiv(height * width, chosen["POSITIONS"]), weights.shape[3], b), "",
        ("grad", "x", "grad_weights"), height=height, width=width, channels=channels, POOLS=weights.shape[3],
        **_strides("grad", grad, "channel"), **_strides("x", x, "channel"))


def _pool(x: Tensor, weights: Tensor, transposed: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        _pooling(x, weights, transposed)(x, weights, out)
    return out


def _strides(name: str, x: Tensor, last: str) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip(("batch", "row", "column", last), x.stride(), strict=True)}


@torch.library.custom_op("zoo::token_aware_avg_pool_triton", mutates_args=())
def token_aware_avg_pool(x: Tensor, weights: Tensor) -> Tensor:
    """See `zoo.kernels.token_aware_avg_pool`."""
    return _pool(x, weights, transposed=False)


@token_aware_avg_pool.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::token_aware_avg_pool_triton_backward", mutates_args=())
def token_aware_avg_pool_backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights."""
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    if grad_weights.numel():
        _weighing(grad, x, weights)(grad, x, grad_weights)
    return _pool(grad, weights, transposed=True), grad_weights


@token_aware_avg_pool_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weights = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (grad, weights))
    return grad_x, grad_weights


call = register_gradient(token_aware_avg_pool, token_aware_avg_pool_backward, reference.token_aware_avg_pool, reference.flops)


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels."""
    for dtype in (torch.bfloat16, torch.float32):
        x, weights = torch.zeros(2, 14, 14, 64, dtype=dtype), torch.zeros(2, 14, 14, 4, dtype=dtype)

        def run(x=x, weights=weights) -> None:
            token_aware_avg_pool(x, weights)
            token_aware_avg_pool_backward(x, x, weights)

        yield name_of(dtype), run
