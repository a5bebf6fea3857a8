"""Region means and routes in Triton.

Means: every value is read once, with the strides of its map. Routes: a program holds the affinities of some query regions to all
others, takes the largest of each row, then the largest of the rest, and writes nothing else.
"""
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import DTYPES, Direct, name_of, observed, register_flops
from .._launch import Prepared, float32_precision, planned
from .._regions import region_size
from .._tiles import kernel

SMALLEST_TILE = 16  # of what matrix units multiply


@triton.jit
def _on_map(region, columns, h, w, height, width):
    """First row and column of a region, and how many of either lie on the map."""
    row, column = region // columns * h, region % columns * w
    return row, column, tl.maximum(tl.minimum(h, height - row), 0), tl.maximum(tl.minimum(w, width - column), 0)


@kernel
def region_means_forward(
    x, means, columns, h, w, height, width, channels, x_batch, x_row, x_column, x_channel, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """One program per region, batch and tile of channels."""
    region, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    row, column, rows_on, columns_on = _on_map(region, columns, h, w, height, width)
    x += batch * x_batch + row * x_row + column * x_column
    total = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, rows_on * columns_on, POSITIONS):
        place = first + tl.arange(0, POSITIONS)
        offset = place // columns_on * x_row + place % columns_on * x_column
        on = (place < rows_on * columns_on)[:, None] & (c < channels)
        total += tl.sum(tl.load(x + offset[:, None] + c * x_channel, mask=on, other=0.0).to(tl.float32), 0)
    means += (batch * tl.num_programs(0) + region) * channels
    tl.store(means + c, total / tl.maximum(rows_on * columns_on, 1), mask=c < channels)


@kernel
def region_means_backward(
    grad, grad_x, columns, h, w, height, width, channels, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """One program per region, batch and tile of channels; grad_x is contiguous."""
    region, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    row, column, rows_on, columns_on = _on_map(region, columns, h, w, height, width)
    above = tl.load(grad + (batch * tl.num_programs(0) + region) * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    share = above / tl.maximum(rows_on * columns_on, 1)
    grad_x += ((batch * height + row) * width + column) * channels
    for first in range(0, rows_on * columns_on, POSITIONS):
        place = first + tl.arange(0, POSITIONS)
        offset = (place // columns_on * width + place % columns_on) * channels
        on = (place < rows_on * columns_on)[:, None] & (c < channels)
        tl.store(grad_x + offset[:, None] + c, share[None, :], mask=on)


@planned
def _averaging(x: Tensor, regions: Sequence[int]) -> Prepared:
    b, height, width, channels = x.shape
    h, w = region_size(height, width, regions)
    return Prepared(
        region_means_forward, x.device, _grid(b, regions, channels), "", ("x", "means"), columns=regions[1], h=h, w=w, height=height,
        width=width, channels=channels, x_batch=x.stride(0), x_row=x.stride(1), x_column=x.stride(2), x_channel=x.stride(3))


@planned
def _spreading(grad: Tensor, height: int, width: int, regions: Sequence[int]) -> Prepared:
    b, _, channels = grad.shape
    h, w = region_size(height, width, regions)
    return Prepared(region_means_backward, grad.device, _grid(b, regions, channels), "", ("grad", "grad_x"), columns=regions[1], h=h, w=w,
                    height=height, width=width, channels=channels)


def _grid(batch: int, regions: Sequence[int], channels: int) -> Callable[[dict], tuple[int, ...]]:
    return lambda chosen: (regions[0] * regions[1], batch, triton.cdiv(channels, chosen["CHANNELS"]))


@torch.library.custom_op("zoo::region_means_triton", mutates_args=())
def region_means(x: Tensor, regions: list[int]) -> Tensor:
    """See `zoo.kernels.region_means`."""
    means = x.new_empty((x.shape[0], regions[0] * regions[1], x.shape[3]))
    _averaging(x, regions)(x, means)
    return means


@region_means.register_fake
def _(x: Tensor, regions: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], regions[0] * regions[1], x.shape[3])


@torch.library.custom_op("zoo::region_means_triton_backward", mutates_args=())
def region_means_triton_backward(grad: Tensor, height: int, width: int, regions: list[int]) -> Tensor:
    grad = grad.contiguous()
    grad_x = grad.new_empty((grad.shape[0], height, width, grad.shape[2]))
    _spreading(grad, height, width, regions)(grad, grad_x)
    return grad_x


@region_means_triton_backward.register_fake
def _(grad: Tensor, height: int, width: int, regions: list[int]) -> Tensor:
    return grad.new_empty(grad.shape[0], height, width, grad.shape[2])


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, ctx.regions = inputs
    ctx.height, ctx.width = x.shape[1:3]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return call_means_backward(observed((grad,)), grad, ctx.height, ctx.width, ctx.regions), None


def _setup_backward(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.regions = inputs[3]


def _backward_of_backward(ctx, grad_x: Tensor) -> tuple[Tensor | None, ...]:
    return call_means(observed((grad_x,)), grad_x, ctx.regions), None, None, None  # each is the other's transpose


region_means.register_autograd(_backward, setup_context=_setup_context)
region_means_triton_backward.register_autograd(_backward_of_backward, setup_context=_setup_backward)
call_means = Direct(region_means, _setup_context, _backward)
call_means_backward = Direct(region_means_triton_backward, _setup_backward, _backward_of_backward)


@kernel
def region_routes_forward(
    q_means, k_means, routes, scores, regions, columns, h, w, height, width, channels, topk,
    PRECISION: tl.constexpr, REGIONS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One program per tile of query regions, and batch."""
    batch = tl.program_id(1).to(tl.int64)
    query, key = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, REGIONS)
    q_means += batch * regions * channels
    k_means += batch * regions * channels
    affinity = tl.zeros((QUERIES, REGIONS), tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        rows = tl.load(q_means + query[:, None] * channels + c, mask=(query[:, None] < regions) & (c < channels), other=0.0)
        others = tl.load(k_means + key[:, None] * channels + c, mask=(key[:, None] < regions) & (c < channels), other=0.0)
        affinity = tl.dot(rows, tl.trans(others), affinity, input_precision=PRECISION)
    on_map = (key // columns * h < height) & (key % columns * w < width)
    affinity = tl.where(on_map, affinity, -float("inf"))

    order = tl.where(affinity == affinity, affinity, float("inf"))  # NaN is first, as torch has it, and never a route of its own
    left = (query[:, None] >= 0) & (key < regions)
    place = (batch * regions + query) * topk
    for slot in range(topk):
        best = tl.max(tl.where(left, order, -float("inf")), 1)
        route = tl.min(tl.where(left & (order == best[:, None]), key, REGIONS), 1)
        chosen = key == route[:, None]
        score = tl.sum(tl.where(chosen, affinity, 0.0), 1)
        tl.store(routes + place + slot, route.to(tl.int64), mask=query < regions)
        tl.store(scores + place + slot, score, mask=query < regions)
        left = left & (key != route[:, None])


@planned
def _routing(q_means: Tensor, k_map: Sequence[int], regions: Sequence[int], topk: int) -> Prepared:
    b, count, channels = q_means.shape
    h, w = region_size(*k_map, regions=regions)
    tile = max(SMALLEST_TILE, triton.next_power_of_2(count))
    return Prepared(
        region_routes_forward, q_means.device, lambda chosen: (triton.cdiv(count, chosen["QUERIES"]), b), f"regions{tile}",
        ("q_means", "k_means", "routes", "scores"), regions=count, columns=regions[1], h=h, w=w, height=k_map[0], width=k_map[1],
        channels=channels, topk=topk, PRECISION=float32_precision(q_means.device), REGIONS=tile)


@torch.library.custom_op("zoo::region_routes_triton", mutates_args=())
def region_routes(q_means: Tensor, k_means: Tensor, k_map: list[int], regions: list[int], topk: int) -> tuple[Tensor, Tensor]:
    """Scores and routes of `zoo.kernels.region_routes`, of means (B, rows·columns, C). Of equal affinities, the first region's."""
    scores, routes = _empty_routes(q_means, topk)
    q_means, k_means = q_means.contiguous(), k_means.contiguous()
    _routing(q_means, k_map, regions, topk)(q_means, k_means, routes, scores)
    return scores, routes


@region_routes.register_fake
def _(q_means: Tensor, k_means: Tensor, k_map: list[int], regions: list[int], topk: int) -> tuple[Tensor, Tensor]:
    return _empty_routes(q_means, topk)


def _empty_routes(q_means: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    shape = *q_means.shape[:2], topk
    return q_means.new_empty(shape), q_means.new_empty(shape, dtype=torch.int64)


def _setup_routes(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.mark_non_differentiable(output[1])


def _backward_routes(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q_means, k_means, scores, routes = ctx.saved_tensors
    grad = grad.masked_fill(scores == -torch.inf, 0)  # regions off the map
    routes = routes.clamp(0, k_means.shape[1] - 1)  # a launch that was only recorded has left them undefined
    grad_affinity = grad.new_zeros(*routes.shape[:2], k_means.shape[1]).scatter(2, routes, grad)  # no region twice: nothing is added
    return grad_affinity @ k_means, grad_affinity.transpose(1, 2) @ q_means, None, None, None


region_routes.register_autograd(_backward_routes, setup_context=_setup_routes)
call_routes = Direct(region_routes, _setup_routes, _backward_routes)


register_flops(region_means, lambda *_, **__: 0)
register_flops(region_means_triton_backward, lambda *_, **__: 0)
register_flops(region_routes, lambda q_means, *_, **__: 2 * math.prod(q_means) * q_means[1])


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels."""
    for dtype in DTYPES:
        x = torch.zeros(2, 14, 14, 64, dtype=dtype, requires_grad=True)
        yield name_of(dtype), lambda x=x: region_means(x, [7, 7]).sum().backward()
        for side in (7, 16):
            means = torch.zeros(1, side**2, 64, dtype=dtype)
            yield f"{name_of(dtype)}, {side**2} regions", lambda x=means, g=[side, side]: region_routes(x, x, g, g, 4)
