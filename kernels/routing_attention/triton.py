"""Routing attention in Triton: keys and values are read where they lie, through the routes.

A program holds a tile of queries of one region and goes over the keys of the regions it is routed to, block by block, with a
running softmax. The backward pass recomputes the attention from its logarithmic denominator, once for the gradient of the
queries and once for that of keys and values: there a program holds keys of one region and goes over the queries of the regions
routed to it, which the sorted routes list, so that nothing is added atomically.

Regions too small to fill the matrix units are packed: a program holds positions of the map in their order, whatever their
regions, goes over the whole map and leaves out what the routes do, read from a set of 64 bits for every region.
"""
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import name_of, register_gradient
from .._launch import Prepared, float32_precision, planned
from .._layout import even, position_stride
from .._regions import region_size
from .._tiles import kernel, load_rows, products, store_rows
from . import reference

LOG2_E = tl.constexpr(math.log2(math.e))
SMALLEST_TILE, LARGEST_TILE = 16, 64  # queries or keys that a program holds; matrix units take 16
BITS = 64
IN_A_TURN = dict.fromkeys(  # scores that a turn of the inner loop works out
    ("routing_attention_forward", "routing_attention_backward_queries", "routing_attention_backward_keys"), ("QUERIES", "KEYS"))


@triton.jit
def _quotient(x, divisor):
    """x // divisor of whole numbers from 0 to 2^22, without a division."""
    return ((x.to(tl.float32) + 0.5) * (1.0 / divisor)).to(tl.int32)


@triton.jit
def _position(region, place, columns, h, w, height, width):
    """Where places of regions lie on the flattened map, and whether they lie on it at all."""
    i, row = _quotient(region, columns), _quotient(place, w)
    row, column = i * h + row, (region - i * columns) * w + place - row * w
    return row * width + column, (place < h * w) & (row < height) & (column < width)


@triton.jit
def _region(position, columns, h, w, width):
    """The region of positions on the flattened map."""
    row = _quotient(position, width)
    return _quotient(row, h) * columns + _quotient(position - row * width, w)


@triton.jit
def _sees(bits, region):
    """Whether regions are in sets of 64 bits, by halves: 64-bit shifts are slow."""
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    return (tl.where(region < 32, low, high) >> (region & 31)) & 1 != 0


@triton.jit
def _held(tile, columns, h, w, height, width, PACKED: tl.constexpr, SIZE: tl.constexpr):
    """The positions that a program holds, whether they are on the map, and their region where it is one."""
    if PACKED:
        position = tile * SIZE + tl.arange(0, SIZE)
        return position, position < height * width, 0
    tiles = tl.cdiv(h * w, SIZE)
    region = tile // tiles
    position, on = _position(region, tile % tiles * SIZE + tl.arange(0, SIZE), columns, h, w, height, width)
    return position, on, region


@triton.jit
def _routed_keys(first, routes, slots, columns, h, w, height, width, KEYS: tl.constexpr):
    """A block of the keys of the routed regions: position, whether on the map, and which route they come by."""
    j = first + tl.arange(0, KEYS)
    slot = _quotient(j, h * w)
    region = tl.load(routes + slot, mask=slot < slots, other=0).to(tl.int32)
    position, on = _position(region, j - slot * (h * w), columns, h, w, height, width)
    return position, on & (slot < slots), slot


@kernel
def routing_attention_forward(
    q, k, v, routes, bits, weights, out, logsumexp, scale, heads, slots, regions, columns,
    height, width, h, w, kv_height, kv_width, kv_h, kv_w,
    q_batch, q_position, q_channel, k_batch, k_position, k_channel, v_batch, v_position, v_channel,
    PACKED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """One program per tile of queries and head, and batch."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    q += batch * q_batch + head * WIDTH * q_channel
    k += batch * k_batch + head * WIDTH * k_channel
    v += batch * v_batch + head * VALUE_WIDTH * v_channel
    position, on, region = _held(tile, columns, h, w, height, width, PACKED, QUERIES)
    if PACKED:
        routed = tl.load(bits + batch * regions + _region(position, columns, h, w, width), mask=on, other=0)
        keys = kv_height * kv_width
    else:
        routes += (batch * regions + region) * slots
        keys = slots * kv_h * kv_w
    queries = load_rows(q, position, on, q_position, q_channel, WIDTH, BLOCK)

    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, VALUE_BLOCK), tl.float32)
    for first in range(0, keys, KEYS):
        if PACKED:
            there = first + tl.arange(0, KEYS)
            exists = there < keys
            seen = exists & _sees(routed[:, None], _region(there, columns, kv_h, kv_w, kv_width))
        else:
            there, exists, slot = _routed_keys(first, routes, slots, columns, kv_h, kv_w, kv_height, kv_width, KEYS)
            seen = exists[None, :]
        scores = products(queries, load_rows(k, there, exists, k_position, k_channel, WIDTH, BLOCK), PRECISION)
        scores *= scale * LOG2_E
        if WEIGHTED:
            factors = tl.load(weights + (batch * regions + region) * slots + slot, mask=slot < slots, other=0.0).to(tl.float32)
            scores *= factors
        scores = tl.where(seen, scores, -float("inf"))
        maximum = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)  # nothing seen yet
        exponentials = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(highest - shift)
        highest, total = maximum, total * fade + tl.sum(exponentials, 1)
        if WEIGHTED:
            exponentials *= factors
        values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_BLOCK)
        sums = tl.dot(exponentials.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out += batch * height * width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    store_rows(out, sums / total[:, None], position, on, heads * VALUE_WIDTH, VALUE_WIDTH, VALUE_BLOCK)
    tl.store(logsumexp + (batch * heads + head) * height * width + position, tl.where(nothing, 0.0, highest + tl.log2(total)), mask=on)


@kernel
def routing_attention_backward_queries(
    grad, q, k, v, routes, bits, weights, out, logsumexp, shares, grad_q, grad_weights, scale, heads, slots, regions, columns,
    height, width, h, w, kv_height, kv_width, kv_h, kv_w,
    grad_batch, grad_position, grad_channel,
    q_batch, q_position, q_channel, k_batch, k_position, k_channel, v_batch, v_position, v_channel,
    PACKED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """As the forward kernel. Also keeps every query's share, the sum of its gradient times its output."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    q += batch * q_batch + head * WIDTH * q_channel
    k += batch * k_batch + head * WIDTH * k_channel
    v += batch * v_batch + head * VALUE_WIDTH * v_channel
    grad += batch * grad_batch + head * VALUE_WIDTH * grad_channel
    out += batch * height * width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    per_query = (batch * heads + head) * height * width
    position, on, region = _held(tile, columns, h, w, height, width, PACKED, QUERIES)
    if PACKED:
        routed = tl.load(bits + batch * regions + _region(position, columns, h, w, width), mask=on, other=0)
        keys = kv_height * kv_width
    else:
        routes += (batch * regions + region) * slots
        keys = slots * kv_h * kv_w
    queries = load_rows(q, position, on, q_position, q_channel, WIDTH, BLOCK)
    above = load_rows(grad, position, on, grad_position, grad_channel, VALUE_WIDTH, VALUE_BLOCK)
    result = load_rows(out, position, on, heads * VALUE_WIDTH, 1, VALUE_WIDTH, VALUE_BLOCK)
    share = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(shares + per_query + position, share, mask=on)
    denominator = tl.load(logsumexp + per_query + position, mask=on, other=0.0)

    sums = tl.zeros((QUERIES, BLOCK), tl.float32)
    if WEIGHTED:
        weight_sums = tl.zeros((SLOTS,), tl.float32)
    for first in range(0, keys, KEYS):
        if PACKED:
            there = first + tl.arange(0, KEYS)
            exists = there < keys
            seen = exists & _sees(routed[:, None], _region(there, columns, kv_h, kv_w, kv_width))
        else:
            there, exists, slot = _routed_keys(first, routes, slots, columns, kv_h, kv_w, kv_height, kv_width, KEYS)
            seen = exists[None, :] & on[:, None]
        key_rows = load_rows(k, there, exists, k_position, k_channel, WIDTH, BLOCK)
        values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_BLOCK)
        scores = products(queries, key_rows, PRECISION) * scale
        grad_attention = products(above, values, PRECISION)
        if WEIGHTED:
            factors = tl.load(weights + (batch * regions + region) * slots + slot, mask=slot < slots, other=0.0).to(tl.float32)
            attention = tl.exp2(tl.where(seen, scores * factors * LOG2_E, -float("inf")) - denominator[:, None])
            grad_scores = attention * (grad_attention * factors - share[:, None])
            per_key = tl.sum(grad_scores * scores + attention * grad_attention, 0)
            weight_sums += tl.sum(tl.where(slot[:, None] == tl.arange(0, SLOTS), per_key[:, None], 0.0), 0)
            grad_scores *= factors
        else:
            attention = tl.exp2(tl.where(seen, scores * LOG2_E, -float("inf")) - denominator[:, None])
            grad_scores = attention * (grad_attention - share[:, None])
        sums = tl.dot(grad_scores.to(key_rows.dtype), key_rows, sums, input_precision=PRECISION)

    grad_q += batch * height * width * heads * WIDTH + head * WIDTH
    store_rows(grad_q, sums * scale, position, on, heads * WIDTH, WIDTH, BLOCK)
    if WEIGHTED:
        slot = tl.arange(0, SLOTS)
        tl.store(grad_weights + ((batch * heads + head) * (tl.num_programs(0) // heads) + tile) * slots + slot, weight_sums,
                 mask=slot < slots)


@kernel
def routing_attention_backward_keys(
    grad, q, k, v, order, starts, bits, weights, logsumexp, shares, grad_k, grad_v, scale, heads, slots, regions, columns,
    height, width, h, w, kv_height, kv_width, kv_h, kv_w,
    grad_batch, grad_position, grad_channel,
    q_batch, q_position, q_channel, k_batch, k_position, k_channel, v_batch, v_position, v_channel,
    PACKED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """One program per tile of keys and head, and batch; scores and attention are (keys, queries) here."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    q += batch * q_batch + head * WIDTH * q_channel
    k += batch * k_batch + head * WIDTH * k_channel
    v += batch * v_batch + head * VALUE_WIDTH * v_channel
    grad += batch * grad_batch + head * VALUE_WIDTH * grad_channel
    per_query = (batch * heads + head) * height * width
    position, on, region = _held(tile, columns, kv_h, kv_w, kv_height, kv_width, PACKED, KEYS)
    if PACKED:
        own = _region(position, columns, kv_h, kv_w, kv_width)
        queries = height * width
    else:
        start = tl.load(starts + batch * (regions + 1) + region).to(tl.int32)
        end = tl.load(starts + batch * (regions + 1) + region + 1).to(tl.int32)
        queries = (end - start) * h * w
    key_rows = load_rows(k, position, on, k_position, k_channel, WIDTH, BLOCK)
    values = load_rows(v, position, on, v_position, v_channel, VALUE_WIDTH, VALUE_BLOCK)

    key_sums = tl.zeros((KEYS, BLOCK), tl.float32)
    value_sums = tl.zeros((KEYS, VALUE_BLOCK), tl.float32)
    for first in range(0, queries, QUERIES):
        j = first + tl.arange(0, QUERIES)
        if PACKED:
            there, exists = j, j < queries
            routed = tl.load(bits + batch * regions + _region(there, columns, h, w, width), mask=exists, other=0)
            seen = on[:, None] & _sees(routed, own[:, None])
        else:
            entry = start + _quotient(j, h * w)
            route = tl.load(order + batch * regions * slots + entry, mask=entry < end, other=0).to(tl.int32)
            there, exists = _position(_quotient(route, slots), j - (entry - start) * (h * w), columns, h, w, height, width)
            exists &= entry < end
            seen = on[:, None] & exists
        rows = load_rows(q, there, exists, q_position, q_channel, WIDTH, BLOCK)
        above = load_rows(grad, there, exists, grad_position, grad_channel, VALUE_WIDTH, VALUE_BLOCK)
        denominator = tl.load(logsumexp + per_query + there, mask=exists, other=0.0)
        share = tl.load(shares + per_query + there, mask=exists, other=0.0)
        scores = products(key_rows, rows, PRECISION) * (scale * LOG2_E)
        grad_attention = products(values, above, PRECISION)
        if WEIGHTED:
            factors = tl.load(weights + batch * regions * slots + route, mask=entry < end, other=0.0).to(tl.float32)  # pyright: ignore[reportOperatorIssue]
            scores *= factors
            grad_attention *= factors
        attention = tl.exp2(tl.where(seen, scores, -float("inf")) - denominator)
        grad_scores = attention * (grad_attention - share)
        if WEIGHTED:
            attention *= factors
            grad_scores *= factors
        value_sums = tl.dot(attention.to(above.dtype), above, value_sums, input_precision=PRECISION)
        key_sums = tl.dot(grad_scores.to(rows.dtype), rows, key_sums, input_precision=PRECISION)

    grad_k += batch * kv_height * kv_width * heads * WIDTH + head * WIDTH
    grad_v += batch * kv_height * kv_width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    store_rows(grad_k, key_sums * scale, position, on, heads * WIDTH, WIDTH, BLOCK)
    store_rows(grad_v, value_sums, position, on, heads * VALUE_WIDTH, VALUE_WIDTH, VALUE_BLOCK)


class _Problem:
    """What all kernels on tensors of these shapes are launched with."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Sequence[int], heads: int, kv_size: Sequence[int], scale: float,
        weights: Tensor | None,
    ):
        (batch, height, width, channels), (kv_height, kv_width, value_channels) = q.shape, v.shape[1:]
        h, w = region_size(height, width, regions)
        self.batch, self.heads, self.regions, self.slots = batch, heads, regions[0] * regions[1], routes.shape[2]
        self.queries, self.keys = height * width, kv_height * kv_width
        self.query_places, self.key_places = h * w, kv_size[0] * kv_size[1]
        self.packed = weights is None and self._packing_pays()
        width_of_head, value_width_of_head = channels // heads, value_channels // heads
        block, value_block = (max(SMALLEST_TILE, triton.next_power_of_2(n)) for n in (width_of_head, value_width_of_head))
        self.arguments = dict(
            scale=scale, heads=heads, slots=self.slots, regions=self.regions, columns=regions[1],
            height=height, width=width, h=h, w=w, kv_height=kv_height, kv_width=kv_width, kv_h=kv_size[0], kv_w=kv_size[1],
            **_strides("q", q), **_strides("k", k), **_strides("v", v), PACKED=self.packed, WEIGHTED=weights is not None,
            PRECISION=float32_precision(q.device),
            WIDTH=width_of_head, BLOCK=block, VALUE_WIDTH=value_width_of_head, VALUE_BLOCK=value_block)
        self._of_heads = f"{8 * q.itemsize}-bit {max(block, value_block)}"

    def _packing_pays(self) -> bool:
        """Whether all scores, of the forward and of the backward pass, are fewer than those of padded regions."""
        t, s, n = self.query_places, self.key_places, self.slots
        padded = max(t, SMALLEST_TILE) * max(n * s, SMALLEST_TILE) + max(s, SMALLEST_TILE) * max(n * t, SMALLEST_TILE)
        return self.regions <= BITS and 2 * self.regions * t * s < padded

    def key(self, places: int) -> str:
        """Of the configuration, for programs that hold places of a region."""
        tile = min(LARGEST_TILE, max(SMALLEST_TILE, triton.next_power_of_2(places)))
        return f"{'packed' if self.packed else f'regions{tile}'} {self._of_heads}"

    def tiles(self, positions: int, places: int, size: int) -> int:
        """How many tiles of this size hold all positions of the map, or all places of its regions."""
        return triton.cdiv(positions, size) if self.packed else self.regions * triton.cdiv(places, size)

    def grid(self, positions: int, places: int, held: str) -> Callable[[dict[str, Any]], tuple[int, int]]:
        return lambda chosen: (self.heads * self.tiles(positions, places, chosen[held]), self.batch)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    strides = x.stride(0), position_stride(x), x.stride(3)
    return {f"{name}_{axis}": stride for axis, stride in zip(("batch", "position", "channel"), strides, strict=True)}


@planned
def _forward_plan(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Sequence[int], heads: int, kv_size: Sequence[int], scale: float,
    weights: Tensor | None,
) -> tuple[Prepared, bool]:
    """Also whether regions are packed."""
    problem = _Problem(q, k, v, routes, regions, heads, kv_size, scale, weights)
    return Prepared(
        routing_attention_forward, q.device, problem.grid(problem.queries, problem.query_places, "QUERIES"),
        problem.key(problem.query_places), ("q", "k", "v", "routes", "bits", "weights", "out", "logsumexp"),
        **problem.arguments), problem.packed


@planned
def _backward_plan(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Sequence[int], heads: int, kv_size: Sequence[int],
    scale: float, weights: Tensor | None,
) -> tuple[Prepared, Prepared, bool, tuple[int, ...]]:
    """Of the gradients of queries and weights, and of keys and values, whether regions are packed, and the shape of the weights' sums."""
    problem = _Problem(q, k, v, routes, regions, heads, kv_size, scale, weights)
    shared, arguments = ("grad", "q", "k", "v", "bits", "weights", "logsumexp", "shares"), problem.arguments | _strides("grad", grad)
    of_queries = Prepared(
        routing_attention_backward_queries, q.device, problem.grid(problem.queries, problem.query_places, "QUERIES"),
        problem.key(problem.query_places), (*shared, "routes", "out", "grad_q", "grad_weights"), **arguments,
        SLOTS=triton.next_power_of_2(problem.slots))
    of_keys = Prepared(
        routing_attention_backward_keys, q.device, problem.grid(problem.keys, problem.key_places, "KEYS"), problem.key(problem.key_places),
        (*shared, "order", "starts", "grad_k", "grad_v"), **arguments)
    tiles = problem.tiles(problem.queries, problem.query_places, of_queries.configuration["QUERIES"])
    return of_queries, of_keys, problem.packed, (problem.batch, heads, tiles, problem.slots)


def _given(routes: Tensor, weights: Tensor | None, packed: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Routes and weights as kernels read them, and for packed regions those that each is routed to, as bits (B, r)."""
    routes = routes.contiguous()
    bits = torch.ones_like(routes).bitwise_left_shift(routes).sum(-1) if packed else None
    return routes, None if weights is None else weights.contiguous(), bits


def _routed_by(routes: Tensor, regions: int, packed: bool) -> tuple[Tensor | None, Tensor | None]:
    """The routes sorted by region, as places in the flattened routes (B, r·n), and where each region's begin (B, r + 1)."""
    if packed:
        return None, None
    by_region, order = routes.flatten(1).sort(stable=True)
    bounds = torch.arange(regions + 1, device=order.device).expand(len(order), -1).contiguous()
    return order, torch.searchsorted(by_region, bounds)


@torch.library.custom_op("zoo::routing_attention_triton", mutates_args=())
def routing_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], scale: float,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.routing_attention`. Also returns the logarithm to base 2 of the softmax's denominators, (B, heads, H·W)."""
    q, k, v = map(even, (q, k, v))
    run, packed = _forward_plan(q, k, v, routes, regions, num_heads, kv_size, scale, weights)
    routes, weights, bits = _given(routes, weights, packed)
    out, logsumexp = _empty_results(q, v, num_heads)
    run(q, k, v, routes, bits, weights, out, logsumexp)
    return out, logsumexp


@routing_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], scale: float,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v, num_heads)


def _empty_results(q: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    b, height, width, _ = q.shape
    return q.new_empty(b, height, width, v.shape[3]), q.new_empty(b, num_heads, height * width, dtype=torch.float32)


@torch.library.custom_op("zoo::routing_attention_triton_backward", mutates_args=())
def routing_attention_triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], scale: float,
    weights: Tensor | None, out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and weights (of no elements where there are none)."""
    grad, q, k, v = map(even, (grad, q, k, v))
    of_queries, of_keys, packed, shape = _backward_plan(grad, q, k, v, routes, regions, num_heads, kv_size, scale, weights)
    routes, weights, bits = _given(routes, weights, packed)
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    weight_sums = None if weights is None else q.new_empty(shape, dtype=torch.float32)
    shared = grad, q, k, v, bits, weights, logsumexp, torch.empty_like(logsumexp)
    of_queries(*shared, routes, out, grad_q, weight_sums)
    of_keys(*shared, *_routed_by(routes, routes.shape[1], packed), grad_k, grad_v)
    if weights is None or weight_sums is None:
        return grad_q, grad_k, grad_v, q.new_empty(0)
    return grad_q, grad_k, grad_v, weight_sums.unflatten(2, (routes.shape[1], -1)).sum((1, 3)).to(weights.dtype)


@routing_attention_triton_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], scale: float,
    weights: Tensor | None, out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = q, k, v, q.new_empty(0) if weights is None else weights
    grad_q, grad_k, grad_v, grad_weights = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)
    return grad_q, grad_k, grad_v, grad_weights


call = register_gradient(routing_attention, routing_attention_triton_backward, reference.routing_attention, reference.flops, kept=(0, 1))


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels. float16 is compiled as bfloat16 is."""
    packed, regions16, regions32, regions64 = (4, 2, False), (8, 2, False), (10, 2, False), (32, 1, False)  # side, routes, weighted
    everything, half, single = (packed, regions16, regions32, regions64), torch.bfloat16, torch.float32
    for dtype, width, shapes in (
        (half, 32, (*everything, (12, 2, False), (32, 1, True))), (half, 16, (packed,)), (half, 64, (packed,)), (half, 128, everything),
        (single, 32, (packed, regions64)), (single, 64, (*everything, (32, 1, True))), (single, 128, everything),
    ):
        for side, topk, weighted in shapes:
            x = torch.zeros(1, side, side, 2 * width, dtype=dtype, requires_grad=True)
            routes = torch.arange(topk).expand(1, 4, topk)
            weights = torch.ones(1, 4, topk, requires_grad=True) if weighted else None
            places = (side // 2) ** 2

            def run(arguments=(x, x, x, routes, [2, 2], 2, [side // 2, side // 2], 1.0, weights)) -> None:
                routing_attention(*arguments)[0].sum().backward()

            yield f"{name_of(dtype)}, {width} channels a head, regions of {places}{', weighted' if weighted else ''}", run
