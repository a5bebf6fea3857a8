"""Routing attention in Triton: keys and values are read where they lie, through the routes.

A program holds a tile of queries of one region and goes over the keys of the regions it is routed to, block by block, with a
running softmax. Where regions fill blocks of their own, it walks route by route: a block then belongs to one route, which is
one number, and one comparison says which of its keys there are. The backward pass recomputes the attention from its
logarithmic denominator, once for the gradient of the queries and once for that of keys and values: there a program holds keys
of one region and goes over the queries of the regions routed to it, which the sorted routes list, so that nothing is added
atomically.

Regions too small to fill the matrix units are packed: a program holds positions of the map in their order, whatever their
regions, goes over the whole map and leaves out what the routes do, read from a set of 64 bits for every region. What is left out has
the factor 0 there, and NaN or infinity times 0 is NaN: where one came out, the program begins again, region by region.
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
SMALLEST_TILE = 16  # queries or keys that a program holds; matrix units take no fewer
WALKED_FROM = 64  # places of a region that fill blocks of their own
BITS = 64
IN_A_TURN = dict.fromkeys(  # scores that a turn of the inner loop works out
    ("routing_attention_forward", "routing_attention_backward_queries", "routing_attention_backward_keys"), ("QUERIES", "KEYS"))


@triton.jit
def _quotient(x, divisor):
    """x // divisor of whole numbers from 0 to 2^22, without a division."""
    return ((tl.cast(x, tl.float32) + 0.5) * (1.0 / divisor)).to(tl.int32)


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
def _routed(routes, on, regions):
    """Routes, and `regions`, of which nothing lies on the map, for what is none."""
    return tl.minimum(tl.load(routes, mask=on, other=0).to(tl.uint64, bitcast=True), tl.cast(regions, tl.uint64)).to(tl.int32)


@triton.jit
def _within(region, first, columns, h, w, height, width, SIZE: tl.constexpr):
    """Positions of one region, those off the map not counted: where they lie, and which there are, from the first on."""
    i = _quotient(region, columns)
    row, column = i * h, (region - i * columns) * w
    rows, across = tl.maximum(tl.minimum(h, height - row), 0), tl.maximum(tl.minimum(w, width - column), 0)
    place = first + tl.arange(0, SIZE)
    return row * width + column + place + _quotient(place, tl.maximum(across, 1)) * (width - across), place < rows * across


@triton.jit
def _held(tile, columns, h, w, height, width, PACKED: tl.constexpr, SIZE: tl.constexpr):
    """The positions that a program holds, whether they are on the map, and their region where it is one."""
    if PACKED:
        position = tile * SIZE + tl.arange(0, SIZE)
        return position, position < height * width, 0
    tiles = tl.cdiv(h * w, SIZE)
    region = tile // tiles
    position, on = _within(region, tile % tiles * SIZE, columns, h, w, height, width, SIZE)
    return position, on, region


@triton.jit
def _routed_keys(first, routes, slots, regions, columns, h, w, height, width, KEYS: tl.constexpr):
    """A block of the keys of the routed regions: position, whether on the map, and which route they come by."""
    j = first + tl.arange(0, KEYS)
    slot = _quotient(j, h * w)
    region = _routed(routes + slot, slot < slots, regions)
    position, on = _position(region, j - slot * (h * w), columns, h, w, height, width)
    return position, on & (slot < slots), slot


@triton.jit
def _broken(sums):
    """Whether a product with 0 was none: of NaN or infinity in regions that some of the positions held do not see."""
    return tl.sum((sums != sums).to(tl.int32)) > 0


@triton.jit
def _grad_scores(scores, grad_attention, seen, denominator, share, scale):
    """Gradient of unscaled scores, by their attention made anew."""
    attention = tl.exp2(tl.where(seen, scores * (scale * LOG2_E), -float("inf")) - denominator)
    return attention * (grad_attention - share)


@kernel
def routing_attention_bits(routes, bits, count, slots, regions, REGIONS: tl.constexpr):
    """One program per tile of all regions of the batch: which regions they are routed to, as bits."""
    own = tl.program_id(0) * REGIONS + tl.arange(0, REGIONS)
    routed = tl.zeros((REGIONS,), tl.int64)
    for slot in range(slots):
        route = _routed(routes + own.to(tl.int64) * slots + slot, own < count, regions)
        routed |= tl.where(route < regions, tl.full((REGIONS,), 1, tl.int64) << route.to(tl.int64), 0)
    tl.store(bits + own, routed, mask=own < count)


@triton.jit
def _add_values(highest, total, sums, scores, values, factors, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr):
    """Takes a block of keys into a running softmax: its highest score and denominator, and the sums of values."""
    maximum = tl.maximum(highest, tl.max(scores, 1))
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)  # nothing seen yet
    exponentials = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(highest - shift)
    total = total * fade + tl.sum(exponentials, 1)
    if WEIGHTED:
        exponentials *= factors
    return maximum, total, tl.dot(exponentials.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)


@kernel
def routing_attention_forward(
    q, k, v, routes, bits, weights, out, logsumexp, scale, heads, slots, regions, columns,
    height, width, h, w, kv_height, kv_width, kv_h, kv_w,
    q_batch, q_position, q_channel, k_batch, k_position, k_channel, v_batch, v_position, v_channel,
    PACKED: tl.constexpr, WALKED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """One program per tile of queries and head, and batch."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    q += batch * q_batch + head * WIDTH * q_channel
    k += batch * k_batch + head * WIDTH * k_channel
    v += batch * v_batch + head * VALUE_WIDTH * v_channel
    position, on, region = _held(tile, columns, h, w, height, width, PACKED, QUERIES)
    blocks = tl.cdiv(kv_h * kv_w, KEYS)  # of a region
    if PACKED:
        routed = tl.load(bits + batch * regions + _region(position, columns, h, w, width), mask=on, other=0)
        turns = tl.cdiv(kv_height * kv_width, KEYS)
    else:
        routes += (batch * regions + region) * slots
        turns = slots * blocks if WALKED else tl.cdiv(slots * kv_h * kv_w, KEYS)
    if WEIGHTED:
        weights += (batch * regions + region) * slots
    queries = load_rows(q, position, on, q_position, q_channel, WIDTH, BLOCK)

    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, VALUE_BLOCK), tl.float32)
    for turn in range(turns):
        if PACKED:
            there = turn * KEYS + tl.arange(0, KEYS)
            exists = there < kv_height * kv_width
        elif WALKED:
            slot = _quotient(turn, blocks)
            first = (turn - slot * blocks) * KEYS
            there, exists = _within(_routed(routes + slot, True, regions), first, columns, kv_h, kv_w, kv_height, kv_width, KEYS)
        else:
            there, exists, slot = _routed_keys(
                turn * KEYS, routes, slots, regions, columns, kv_h, kv_w, kv_height, kv_width, KEYS)
        scores = products(queries, load_rows(k, there, exists, k_position, k_channel, WIDTH, BLOCK), PRECISION) * (scale * LOG2_E)
        if WEIGHTED:
            factors = tl.load(weights + slot, mask=slot < slots, other=0.0).to(tl.float32)
            scores *= factors
        else:
            factors = 1.0
        if PACKED:
            seen = exists & _sees(routed[:, None], _region(there, columns, kv_h, kv_w, kv_width))
            scores = tl.where(seen, scores, -float("inf"))
        else:
            scores += tl.where(exists, 0.0, -float("inf"))[None, :]
        values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_BLOCK)
        highest, total, sums = _add_values(highest, total, sums, scores, values, factors, WEIGHTED, PRECISION)

    if PACKED:  # noqa: SIM102  Triton compiles both sides of `and`
        if _broken(sums):
            highest = tl.full((QUERIES,), -float("inf"), tl.float32)
            total = tl.zeros((QUERIES,), tl.float32)
            sums = tl.zeros((QUERIES, VALUE_BLOCK), tl.float32)
            for turn in tl.range(regions * blocks, num_stages=1):
                other = _quotient(turn, blocks)
                there, exists = _within(other, (turn - other * blocks) * KEYS, columns, kv_h, kv_w, kv_height, kv_width, KEYS)
                sees = _sees(routed, other)[:, None]
                scores = products(queries, load_rows(k, there, exists, k_position, k_channel, WIDTH, BLOCK), PRECISION)
                scores = tl.where(sees & exists[None, :], scores * (scale * LOG2_E), -float("inf"))
                values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_BLOCK)
                highest, total, added = _add_values(highest, total, sums, scores, values, 1.0, WEIGHTED, PRECISION)
                sums = tl.where(sees, added, sums)

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
    PACKED: tl.constexpr, WALKED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr,
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
    blocks = tl.cdiv(kv_h * kv_w, KEYS)
    if PACKED:
        routed = tl.load(bits + batch * regions + _region(position, columns, h, w, width), mask=on, other=0)
        turns = tl.cdiv(kv_height * kv_width, KEYS)
    else:
        routes += (batch * regions + region) * slots
        turns = slots * blocks if WALKED else tl.cdiv(slots * kv_h * kv_w, KEYS)
    queries = load_rows(q, position, on, q_position, q_channel, WIDTH, BLOCK)
    above = load_rows(grad, position, on, grad_position, grad_channel, VALUE_WIDTH, VALUE_BLOCK)
    result = load_rows(out, position, on, heads * VALUE_WIDTH, 1, VALUE_WIDTH, VALUE_BLOCK)
    share = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(shares + per_query + position, share, mask=on)
    denominator = tl.load(logsumexp + per_query + position, mask=on, other=float("inf"))  # off the map there is no attention

    sums = tl.zeros((QUERIES, BLOCK), tl.float32)
    if WEIGHTED:
        weights += (batch * regions + region) * slots
        weight_sums = tl.zeros((SLOTS,), tl.float32)
    for turn in range(turns):
        if PACKED:
            there = turn * KEYS + tl.arange(0, KEYS)
            exists = there < kv_height * kv_width
            seen = exists & _sees(routed[:, None], _region(there, columns, kv_h, kv_w, kv_width))
        elif WALKED:
            slot = _quotient(turn, blocks)
            first = (turn - slot * blocks) * KEYS
            there, exists = _within(_routed(routes + slot, True, regions), first, columns, kv_h, kv_w, kv_height, kv_width, KEYS)
            seen = exists[None, :]
        else:
            there, exists, slot = _routed_keys(
                turn * KEYS, routes, slots, regions, columns, kv_h, kv_w, kv_height, kv_width, KEYS)
            seen = exists[None, :]
        key_rows = load_rows(k, there, exists, k_position, k_channel, WIDTH, BLOCK)
        values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_BLOCK)
        scores = products(queries, key_rows, PRECISION)
        grad_attention = products(above, values, PRECISION)
        if WEIGHTED:
            factors = tl.load(weights + slot, mask=slot < slots, other=0.0).to(tl.float32)
            scores *= scale
            attention = tl.exp2(tl.where(seen, scores * factors * LOG2_E, -float("inf")) - denominator[:, None])
            grad_scores = attention * (grad_attention * factors - share[:, None])
            per_key = tl.sum(grad_scores * scores + attention * grad_attention, 0)
            if WALKED:
                weight_sums += tl.where(slot == tl.arange(0, SLOTS), tl.sum(per_key), 0.0)
            else:
                weight_sums += tl.sum(tl.where(slot[:, None] == tl.arange(0, SLOTS), per_key[:, None], 0.0), 0)
            grad_scores *= factors
        else:
            grad_scores = _grad_scores(scores, grad_attention, seen, denominator[:, None], share[:, None], scale)
        sums = tl.dot(grad_scores.to(key_rows.dtype), key_rows, sums, input_precision=PRECISION)

    if PACKED:  # noqa: SIM102  as in the forward kernel
        if _broken(sums):
            sums = tl.zeros((QUERIES, BLOCK), tl.float32)
            for turn in tl.range(regions * blocks, num_stages=1):
                other = _quotient(turn, blocks)
                there, exists = _within(other, (turn - other * blocks) * KEYS, columns, kv_h, kv_w, kv_height, kv_width, KEYS)
                sees = _sees(routed, other)[:, None]
                key_rows = load_rows(k, there, exists, k_position, k_channel, WIDTH, BLOCK)
                values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_BLOCK)
                scores = products(queries, key_rows, PRECISION)
                grad_attention = products(above, values, PRECISION)
                grad_scores = _grad_scores(scores, grad_attention, sees & exists[None, :], denominator[:, None], share[:, None], scale)
                sums = tl.where(sees, tl.dot(grad_scores.to(key_rows.dtype), key_rows, sums, input_precision=PRECISION), sums)

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
    PACKED: tl.constexpr, WALKED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
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
    blocks = tl.cdiv(h * w, QUERIES)  # of a region
    if PACKED:
        own = _region(position, columns, kv_h, kv_w, kv_width)[:, None]
        bits += batch * regions
        turns = tl.cdiv(height * width, QUERIES)
    else:
        start = tl.load(starts + batch * (regions + 1) + region).to(tl.int32)
        end = tl.load(starts + batch * (regions + 1) + region + 1).to(tl.int32)
        order += batch * regions * slots
        turns = (end - start) * blocks if WALKED else tl.cdiv((end - start) * h * w, QUERIES)
    if WEIGHTED:
        weights += batch * regions * slots
    key_rows = load_rows(k, position, on, k_position, k_channel, WIDTH, BLOCK)
    values = load_rows(v, position, on, v_position, v_channel, VALUE_WIDTH, VALUE_BLOCK)

    key_sums = tl.zeros((KEYS, BLOCK), tl.float32)
    value_sums = tl.zeros((KEYS, VALUE_BLOCK), tl.float32)
    for turn in range(turns):
        if PACKED:
            there = turn * QUERIES + tl.arange(0, QUERIES)
            exists = there < height * width
            routed = tl.load(bits + _region(there, columns, h, w, width), mask=exists, other=0)
            seen = on[:, None] & _sees(routed, own)
        elif WALKED:
            entry = _quotient(turn, blocks)
            route = tl.load(order + start + entry).to(tl.int32)
            first = (turn - entry * blocks) * QUERIES
            there, exists = _within(_quotient(route, slots), first, columns, h, w, height, width, QUERIES)
        else:
            j = turn * QUERIES + tl.arange(0, QUERIES)
            entry = start + _quotient(j, h * w)
            route = tl.load(order + entry, mask=entry < end, other=0).to(tl.int32)
            there, exists = _position(_quotient(route, slots), j - (entry - start) * (h * w), columns, h, w, height, width)
            exists &= entry < end
        rows = load_rows(q, there, exists, q_position, q_channel, WIDTH, BLOCK)
        above = load_rows(grad, there, exists, grad_position, grad_channel, VALUE_WIDTH, VALUE_BLOCK)
        denominator = tl.load(logsumexp + per_query + there, mask=exists, other=float("inf"))  # where is no query is no attention
        share = tl.load(shares + per_query + there, mask=exists, other=0.0)
        scores = products(key_rows, rows, PRECISION) * (scale * LOG2_E)
        grad_attention = products(values, above, PRECISION)
        if WEIGHTED:
            factors = tl.load(weights + route).to(tl.float32)
            scores *= factors
            grad_attention *= factors
        if PACKED:
            scores = tl.where(seen, scores, -float("inf"))
        attention = tl.exp2(scores - denominator)
        grad_scores = attention * (grad_attention - share)
        if WEIGHTED:
            attention *= factors
            grad_scores *= factors
        value_sums = tl.dot(attention.to(above.dtype), above, value_sums, input_precision=PRECISION)
        key_sums = tl.dot(grad_scores.to(rows.dtype), rows, key_sums, input_precision=PRECISION)

    if PACKED:  # noqa: SIM102  as in the forward kernel
        if _broken(key_sums) | _broken(value_sums):
            key_sums = tl.zeros((KEYS, BLOCK), tl.float32)
            value_sums = tl.zeros((KEYS, VALUE_BLOCK), tl.float32)
            for turn in tl.range(regions * blocks, num_stages=1):
                other = _quotient(turn, blocks)
                there, exists = _within(other, (turn - other * blocks) * QUERIES, columns, h, w, height, width, QUERIES)
                sees = on[:, None] & _sees(tl.load(bits + other), own)
                rows = load_rows(q, there, exists, q_position, q_channel, WIDTH, BLOCK)
                above = load_rows(grad, there, exists, grad_position, grad_channel, VALUE_WIDTH, VALUE_BLOCK)
                denominator = tl.load(logsumexp + per_query + there, mask=exists, other=float("inf"))
                share = tl.load(shares + per_query + there, mask=exists, other=0.0)
                attention = tl.exp2(products(key_rows, rows, PRECISION) * (scale * LOG2_E) - denominator)
                grad_scores = attention * (products(values, above, PRECISION) - share)
                added = tl.dot(attention.to(above.dtype), above, value_sums, input_precision=PRECISION)
                value_sums = tl.where(sees, added, value_sums)
                added = tl.dot(grad_scores.to(rows.dtype), rows, key_sums, input_precision=PRECISION)
                key_sums = tl.where(sees, added, key_sums)

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
        self.device = q.device
        self.batch, self.heads, self.regions, self.slots = batch, heads, regions[0] * regions[1], routes.shape[2]
        self.queries, self.keys = height * width, kv_height * kv_width
        self.query_places, self.key_places = h * w, kv_size[0] * kv_size[1]
        width_of_head, value_width_of_head = channels // heads, value_channels // heads
        # Registers do not hold packed tiles of the widest heads in float32.
        wide = q.dtype == torch.float32 and max(width_of_head, value_width_of_head) > 64
        self.packed = weights is None and not wide and self._packing_pays()
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

    def walked(self, others: int) -> bool:
        """Whether every block of the loop holds places of one region only, where regions have so many."""
        return not self.packed and others >= WALKED_FROM

    def key(self, places: int, others: int) -> str:
        """Of the configuration, for programs that hold places of a region and go over others."""
        largest = 2 * WALKED_FROM if self.walked(others) and others > WALKED_FROM else WALKED_FROM
        tile = min(largest, max(SMALLEST_TILE, triton.next_power_of_2(places)))
        return f"{'packed' if self.packed else f'regions{tile}'} {self._of_heads}"

    def tiles(self, positions: int, places: int, size: int) -> int:
        """How many tiles of this size hold all positions of the map, or all places of its regions."""
        return triton.cdiv(positions, size) if self.packed else self.regions * triton.cdiv(places, size)

    def grid(self, positions: int, places: int, held: str) -> Callable[[dict[str, Any]], tuple[int, int]]:
        return lambda chosen: (self.heads * self.tiles(positions, places, chosen[held]), self.batch)

    def over_keys(self, kernel: Any, tensors: tuple[str, ...], **more: Any) -> Prepared:
        """Of a kernel whose programs hold queries."""
        return Prepared(
            kernel, self.device, self.grid(self.queries, self.query_places, "QUERIES"), self.key(self.query_places, self.key_places),
            tensors, **self.arguments, **more, WALKED=self.walked(self.key_places))

    def of_bits(self) -> Prepared | None:
        """Of the routed regions as bits, which packed regions are read by."""
        if not self.packed:
            return None
        count = self.batch * self.regions
        return Prepared(routing_attention_bits, self.device, lambda chosen: (triton.cdiv(count, chosen["REGIONS"]),), "",
                        ("routes", "bits"), count=count, slots=self.slots, regions=self.regions)


def _strides(name: str, x: Tensor) -> dict[str, int | None]:
    strides = x.stride(0), position_stride(x), x.stride(3)
    return {f"{name}_{axis}": stride for axis, stride in zip(("batch", "position", "channel"), strides, strict=True)}


@planned
def _forward_plan(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Sequence[int], heads: int, kv_size: Sequence[int], scale: float,
    weights: Tensor | None,
) -> tuple[Prepared, Prepared | None]:
    """Also of the bits, where regions are packed."""
    problem = _Problem(q, k, v, routes, regions, heads, kv_size, scale, weights)
    return problem.over_keys(routing_attention_forward, ("q", "k", "v", "routes", "bits", "weights", "out", "logsumexp")), problem.of_bits()


@planned
def _backward_plan(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Sequence[int], heads: int, kv_size: Sequence[int],
    scale: float, weights: Tensor | None,
) -> tuple[Prepared, Prepared, Prepared | None, tuple[int, ...]]:
    """Of the gradients of queries and weights, of keys and values, of the bits, and the shape of the weights' sums."""
    problem = _Problem(q, k, v, routes, regions, heads, kv_size, scale, weights)
    shared, strides = ("grad", "q", "k", "v", "bits", "weights", "logsumexp", "shares"), _strides("grad", grad)
    of_queries = problem.over_keys(
        routing_attention_backward_queries, (*shared, "routes", "out", "grad_q", "grad_weights"), **strides,
        SLOTS=triton.next_power_of_2(problem.slots))
    of_keys = Prepared(
        routing_attention_backward_keys, q.device, problem.grid(problem.keys, problem.key_places, "KEYS"),
        problem.key(problem.key_places, problem.query_places), (*shared, "order", "starts", "grad_k", "grad_v"), **problem.arguments,
        **strides, WALKED=problem.walked(problem.query_places))
    tiles = problem.tiles(problem.queries, problem.query_places, of_queries.configuration["QUERIES"])
    return of_queries, of_keys, problem.of_bits(), (problem.batch, heads, tiles, problem.slots)


def _given(routes: Tensor, weights: Tensor | None, of_bits: Prepared | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Routes and weights as kernels read them, and for packed regions those that each is routed to, as bits (B, r)."""
    routes = routes.contiguous()
    bits = None if of_bits is None else torch.empty_like(routes[..., 0], memory_format=torch.contiguous_format)
    if of_bits is not None:
        of_bits(routes, bits)
    return routes, None if weights is None else weights.contiguous(), bits


def _routed_by(routes: Tensor, regions: int) -> tuple[Tensor, Tensor]:
    """The routes sorted by region, as places in the flattened routes (B, r·n), and where each region's begin (B, r + 1)."""
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
    run, of_bits = _forward_plan(q, k, v, routes, regions, num_heads, kv_size, scale, weights)
    routes, weights, bits = _given(routes, weights, of_bits)
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
    of_queries, of_keys, of_bits, shape = _backward_plan(grad, q, k, v, routes, regions, num_heads, kv_size, scale, weights)
    routes, weights, bits = _given(routes, weights, of_bits)
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    weight_sums = None if weights is None else q.new_empty(shape, dtype=torch.float32)
    shared = grad, q, k, v, bits, weights, logsumexp, torch.empty_like(logsumexp)
    of_queries(*shared, routes, out, grad_q, weight_sums)
    of_keys(*shared, *((None, None) if of_bits else _routed_by(routes, routes.shape[1])), grad_k, grad_v)
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
    packed, regions16, regions32, regions64, walked64, walked128 = (  # side of the map, routes, weighted
        (side, topk, False) for side, topk in ((4, 2), (8, 2), (10, 2), (12, 2), (16, 2), (32, 1)))
    everything, weighted128 = (packed, regions16, regions32, regions64, walked128), (32, 1, True)
    half, single = torch.bfloat16, torch.float32
    for dtype, width, shapes in (
        (half, 32, (packed, walked128, weighted128, regions16, regions32, regions64, (12, 2, True), walked64)), (half, 16, (packed,)),
        (half, 64, (packed, walked128)), (half, 128, everything), (single, 32, (packed, regions64, walked128)),
        (single, 64, (*everything, walked64, weighted128)), (single, 128, everything),
    ):
        for side, topk, weighted in shapes:
            qkv = torch.zeros(1, side, side, 6 * width, dtype=dtype, requires_grad=True).chunk(3, -1)
            routes = torch.arange(topk).expand(1, 4, topk)
            weights = torch.ones(1, 4, topk, requires_grad=True) if weighted else None
            places = (side // 2) ** 2

            def run(arguments=(*qkv, routes, [2, 2], 2, [side // 2, side // 2], 1.0, weights)) -> None:
                routing_attention(*arguments)[0].sum().backward()

            yield f"{name_of(dtype)}, {width} channels a head, regions of {places}{', weighted' if weighted else ''}", run
