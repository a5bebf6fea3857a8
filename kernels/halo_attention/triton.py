"""Halo attention in Triton: keys and values are read where they lie.

A program holds a tile of queries of one block and goes over the keys of its window with a running softmax. The backward pass
recomputes the attention from its logarithmic denominator, once for the gradient of the queries and once for that of keys and
values: there a program holds a patch of keys and goes over the queries of the blocks whose windows reach it, so that nothing is
added atomically. The smaller the patch, the fewer of these do not attend to it.

The score of a relative position is the sum of one for its row and one for its column, products of the query and the tables. A
block of keys is some rows of the window, each padded to a power of two. So the scores of columns are the same in every block
and those of rows are a number per row: a program makes both once, of its queries, and reads nothing per query and key. What
reaches them in the backward pass is summed per query and offset, and the tables' gradients are again products, of every program a
part. For the patches of keys it keeps every query's scores of its window's rows and columns: to make them again takes longer than
to read them (benchmarks/halo.md).
"""
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import autocasting, name_of, register_gradient
from .._launch import Prepared, float32_precision, planned
from .._layout import even, position_stride
from .._tiles import kernel, load_rows, products, store_rows
from . import reference

LOG2_E = tl.constexpr(math.log2(math.e))
SMALLEST_TILE, LARGEST_TILE = 16, 64  # queries that a program holds; matrix units take 16
IN_A_TURN = {  # scores that a turn of the inner loop works out
    "halo_attention_forward": ("QUERIES", "KEYS"), "halo_attention_backward_queries": ("QUERIES", "KEYS"),
    "halo_attention_backward_keys": ("QUERIES", "PATCH", "PATCH"),
}


@triton.jit
def _queries_of(tile, columns, q_height, q_width, SIDE: tl.constexpr, QUERIES: tl.constexpr):
    """A tile of the queries of a block: the block's row and column, theirs in it, where they lie, and whether on the map."""
    tiles: tl.constexpr = (SIDE * SIDE + QUERIES - 1) // QUERIES
    place = tile % tiles * QUERIES + tl.arange(0, QUERIES)
    row, column, i, j = tile // tiles // columns, tile // tiles % columns, place // SIDE, place % SIDE
    y, x = row * SIDE + i, column * SIDE + j
    return row, column, i, j, y * q_width + x, (place < SIDE * SIDE) & (y < q_height) & (x < q_width)


@triton.jit
def _keys_of(i, j, row, column, height, width, BLOCK: tl.constexpr, HALO: tl.constexpr):
    """Keys at rows i and columns j of a block's window: where they lie, whether on the map, and whether within the border."""
    window: tl.constexpr = BLOCK + 2 * HALO
    y, x = row * BLOCK + i - HALO, column * BLOCK + j - HALO
    seen = (i < window) & (j < window) & (y < height + HALO) & (x < width + HALO)
    return y * width + x, seen & (y >= 0) & (y < height) & (x >= 0) & (x < width), seen


@triton.jit
def _plus_products(scores, queries, table, PRECISION: tl.constexpr):
    """scores + queries table. The table is in float32: two parts of 16 bits, where the queries have as many."""
    if queries.dtype == tl.float32:
        return tl.dot(queries, table, scores, input_precision=PRECISION)
    high = table.to(queries.dtype)
    low = (table - high.to(tl.float32)).to(queries.dtype)
    return tl.dot(queries, high, tl.dot(queries, low, scores))


@triton.jit
def _offset_scores(
    q, table, position, on, stride_position, stride_channel, PRECISION: tl.constexpr, OFFSETS: tl.constexpr, OFFSET_TILE: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
):
    """Scores of queries and offsets of rows, and of columns, to base 2: twice (queries, OFFSET_TILE), float32."""
    # Channels at a time: products of all, in float32, take too many registers.
    some: tl.constexpr = min(WIDTH_TILE, 32)  # pyright: ignore[reportAssignmentType]  # the compiler has constants only
    offset = tl.arange(0, OFFSET_TILE)
    by_row = tl.zeros((position.shape[0], OFFSET_TILE), tl.float32)
    by_column = tl.zeros((position.shape[0], OFFSET_TILE), tl.float32)
    for first in tl.range(0, WIDTH_TILE, some, num_stages=1):
        c = first + tl.arange(0, some)
        queries = tl.load(q + position[:, None] * stride_position + c * stride_channel, mask=on[:, None] & (c < WIDTH), other=0.0)
        entry, mask = table + offset * WIDTH + c[:, None], (offset < OFFSETS) & (c[:, None] < WIDTH)
        by_row = _plus_products(by_row, queries, tl.load(entry, mask=mask, other=0.0), PRECISION)
        entry += OFFSETS * WIDTH
        by_column = _plus_products(by_column, queries, tl.load(entry, mask=mask, other=0.0), PRECISION)
    return by_row * LOG2_E, by_column * LOG2_E


@triton.jit
def _taken(scores, offsets, TILE: tl.constexpr):
    """Of every query the scores of these offsets, (queries, n); of offsets beyond the tile, which no key has, any."""
    return tl.gather(scores, tl.maximum(tl.minimum(offsets, TILE - 1), 0), 1)


@triton.constexpr_function
def _before(halo):
    """Places of a query's scores of an axis that lie before its block: so many that 4 divides them, and 4 are read at a time."""
    return -(-halo // 4) * 4


@triton.constexpr_function
def _length(block, halo):
    """Scores of an axis that are kept for a query, those of its window and what makes it a multiple of 4."""
    return _before(halo) + -(-(block + halo) // 4) * 4


@triton.jit
def _keep(
    at, scores, first, on, BLOCK: tl.constexpr, HALO: tl.constexpr, OFFSET_TILE: tl.constexpr, AXIS_TILE: tl.constexpr,
):
    """Writes every query's scores of the places of its window along one axis, of which it has the first at offset `first`."""
    place = tl.arange(0, AXIS_TILE)
    key = place - (_before(HALO) - HALO)
    taken = tl.where((key >= 0) & (key < BLOCK + 2 * HALO), _taken(scores, first[:, None] + key, OFFSET_TILE), -float("inf"))
    tl.store(at[:, None] + place, taken, mask=on[:, None] & (place < _length(BLOCK, HALO)))


@triton.jit
def _of_rows(scores, start, first, within, ROWS: tl.constexpr):
    """Scores of ROWS rows of the window from the first, each for the keys that `within` counts to it: (queries, keys).

    A query's score of row 0 is at `start`. Picked by sums: they stay in the layout of products, where a gather is slow.
    """
    result = tl.zeros((scores.shape[0], within.shape[0]), tl.float32)
    for n in tl.static_range(ROWS):
        here = tl.arange(0, scores.shape[1]) == (start + first + n)[:, None]
        result = tl.where(within == n, tl.sum(tl.where(here, scores, 0.0), 1)[:, None], result)
    return result


@kernel
def halo_attention_forward(
    q, k, v, table, out, logsumexp, scale, heads, columns, height, width, q_height, q_width,
    q_batch, q_position, q_head, q_channel, k_batch, k_position, k_head, k_channel, v_batch, v_position, v_head, v_channel,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_TILE: tl.constexpr,
    WINDOW_TILE: tl.constexpr, OFFSET_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """One program per tile of queries and head, and batch."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    window: tl.constexpr = BLOCK + 2 * HALO
    offsets: tl.constexpr = window + SIDE - 1
    across: tl.constexpr = min(WINDOW_TILE, KEYS)  # keys of a row in a block of keys
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    per_query = batch * q_height * q_width * heads
    row, column, i, j, position, on = _queries_of(tile, columns, q_height, q_width, SIDE, QUERIES)
    own = position * heads + head
    queries = load_rows(q, position, on, q_position, q_channel, WIDTH, WIDTH_TILE)

    lane, start = tl.arange(0, KEYS), SIDE - 1 - i
    row_scores, all_column_scores = _offset_scores(
        q, table, position, on, q_position, q_channel, PRECISION, offsets, OFFSET_TILE, WIDTH, WIDTH_TILE)
    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, VALUE_TILE), tl.float32)
    for left in range(0, window, across):  # once, but for large windows
        key_j = left + lane % across
        column_scores = _taken(all_column_scores, SIDE - 1 - j[:, None] + key_j, OFFSET_TILE)
        for top in range(0, window, KEYS // across):
            there, exists, seen = _keys_of(top + lane // across, key_j, row, column, height, width, BLOCK, HALO)
            keys = load_rows(k, there, exists, k_position, k_channel, WIDTH, WIDTH_TILE)
            scores = products(queries, keys, PRECISION) * (scale * LOG2_E) + column_scores
            scores += _of_rows(row_scores, start, top, lane // across, KEYS // across)
            scores = tl.where(seen, scores, -float("inf"))
            maximum = tl.maximum(highest, tl.max(scores, 1))
            exponentials = tl.exp2(scores - maximum[:, None])
            fade = tl.exp2(highest - maximum)
            highest, total = maximum, total * fade + tl.sum(exponentials, 1)
            values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_TILE)
            sums = tl.dot(exponentials.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)

    out += batch * q_height * q_width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    store_rows(out, sums / total[:, None], position, on, heads * VALUE_WIDTH, VALUE_WIDTH, VALUE_TILE)
    tl.store(logsumexp + per_query + own, highest + tl.log2(total), mask=on)


@triton.jit
def _to_table(
    grad_queries, grad_scores, queries, table, grad_table, PRECISION: tl.constexpr, OFFSETS: tl.constexpr, OFFSET_TILE: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
):
    """Writes the gradient of a table of which queries and offsets have these, and returns grad_queries + grad_scores table."""
    offset, c, rounded = tl.arange(0, OFFSET_TILE), tl.arange(0, WIDTH_TILE), grad_scores.to(queries.dtype)
    mask = (offset < OFFSETS)[:, None] & (c < WIDTH)
    tl.store(grad_table + offset[:, None] * WIDTH + c, tl.dot(tl.trans(rounded), queries, input_precision=PRECISION), mask=mask)
    entries = tl.load(table + offset[:, None] * WIDTH + c, mask=mask, other=0.0)
    return _plus_products(grad_queries, rounded, entries, PRECISION)


@kernel
def halo_attention_backward_queries(
    grad, q, k, v, table, out, logsumexp, shares, axis_scores, grad_q, grad_table, scale, heads, columns, height, width,
    q_height, q_width,     grad_batch, grad_position, grad_head, grad_channel,
    q_batch, q_position, q_head, q_channel, k_batch, k_position, k_head, k_channel, v_batch, v_position, v_head, v_channel,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_TILE: tl.constexpr,
    AXIS_TILE: tl.constexpr, WINDOW_TILE: tl.constexpr, OFFSET_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """As the forward kernel. Also keeps every query's share, the sum of its gradient times its output."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    window: tl.constexpr = BLOCK + 2 * HALO
    offsets: tl.constexpr = window + SIDE - 1
    across: tl.constexpr = min(WINDOW_TILE, KEYS)
    grad += batch * grad_batch + head * grad_head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    per_query = batch * q_height * q_width * heads
    row, column, i, j, position, on = _queries_of(tile, columns, q_height, q_width, SIDE, QUERIES)
    own = position * heads + head
    queries = load_rows(q, position, on, q_position, q_channel, WIDTH, WIDTH_TILE)
    above = load_rows(grad, position, on, grad_position, grad_channel, VALUE_WIDTH, VALUE_TILE)
    out += batch * q_height * q_width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    result = load_rows(out, position, on, heads * VALUE_WIDTH, 1, VALUE_WIDTH, VALUE_TILE)
    share = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(shares + per_query + own, share, mask=on)
    denominator = tl.load(logsumexp + per_query + own, mask=on, other=0.0)

    lane, start = tl.arange(0, KEYS), SIDE - 1 - i
    row_scores, all_column_scores = _offset_scores(
        q, table, position, on, q_position, q_channel, PRECISION, offsets, OFFSET_TILE, WIDTH, WIDTH_TILE)
    length: tl.constexpr = _length(BLOCK, HALO)
    axis_scores += (per_query + own) * (2 * length)
    _keep(axis_scores, row_scores, start, on, BLOCK, HALO, OFFSET_TILE, AXIS_TILE)
    _keep(axis_scores + length, all_column_scores - denominator[:, None], SIDE - 1 - j, on, BLOCK, HALO, OFFSET_TILE, AXIS_TILE)
    offset = tl.arange(0, OFFSET_TILE)
    sums = tl.zeros((QUERIES, WIDTH_TILE), tl.float32)
    row_sums = tl.zeros((QUERIES, OFFSET_TILE), tl.float32)
    column_sums = tl.zeros((QUERIES, OFFSET_TILE), tl.float32)
    for left in range(0, window, across):
        key_j = left + lane % across
        column_scores = _taken(all_column_scores, SIDE - 1 - j[:, None] + key_j, OFFSET_TILE) - denominator[:, None]
        of_columns = tl.zeros((QUERIES, KEYS), tl.float32)
        for top in range(0, window, KEYS // across):
            there, exists, seen = _keys_of(top + lane // across, key_j, row, column, height, width, BLOCK, HALO)
            keys = load_rows(k, there, exists, k_position, k_channel, WIDTH, WIDTH_TILE)
            values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_TILE)
            scores = products(queries, keys, PRECISION) * (scale * LOG2_E) + column_scores
            scores += _of_rows(row_scores, start, top, lane // across, KEYS // across)
            attention = tl.exp2(tl.where(seen, scores, -float("inf")))
            grad_scores = attention * (products(above, values, PRECISION) - share[:, None])
            sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision=PRECISION)
            of_columns += grad_scores
            for n in tl.static_range(KEYS // across):
                of_row = tl.sum(tl.where(lane // across == n, grad_scores, 0.0), 1)
                row_sums += tl.where(offset == (start + top + n)[:, None], of_row[:, None], 0.0)
        place = offset - (SIDE - 1 - j[:, None] + left)
        of_places = tl.sum(tl.reshape(of_columns, (QUERIES, KEYS // across, across)), 1)
        column_sums += tl.where((place >= 0) & (place < across), _taken(of_places, place, across), 0.0)

    sums *= scale
    grad_table += (batch * tl.num_programs(0) + tl.program_id(0)) * (2 * offsets * WIDTH)
    sums = _to_table(sums, row_sums, queries, table, grad_table, PRECISION, offsets, OFFSET_TILE, WIDTH, WIDTH_TILE)
    sums = _to_table(sums, column_sums, queries, table + offsets * WIDTH, grad_table + offsets * WIDTH, PRECISION, offsets, OFFSET_TILE,
                     WIDTH, WIDTH_TILE)
    grad_q += batch * q_height * q_width * heads * WIDTH + head * WIDTH
    store_rows(grad_q, sums, position, on, heads * WIDTH, WIDTH, WIDTH_TILE)


@kernel
def halo_attention_backward_keys(
    grad, q, k, v, axis_scores, shares, grad_k, grad_v, scale, heads, rows, columns, height, width, q_height, q_width,
    grad_batch, grad_position, grad_head, grad_channel,
    q_batch, q_position, q_head, q_channel, k_batch, k_position, k_head, k_channel, v_batch, v_position, v_head, v_channel,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_TILE: tl.constexpr,
    QUERIES: tl.constexpr, PATCH: tl.constexpr,
):
    """One program per patch of PATCH × PATCH keys and head, and batch; scores and attention are (keys, queries) here."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    keys: tl.constexpr = PATCH * PATCH
    grad += batch * grad_batch + head * grad_head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    per_query = batch * q_height * q_width * heads
    length: tl.constexpr = _length(BLOCK, HALO)
    axis_scores += per_query * (2 * length)
    patches, place, side = tl.cdiv(width, PATCH), tl.arange(0, keys), tl.arange(0, PATCH)
    top, left = tile // patches * PATCH, tile % patches * PATCH
    y, x = top + place // PATCH, left + place % PATCH
    position, on = y * width + x, (y < height) & (x < width)
    key_rows = load_rows(k, position, on, k_position, k_channel, WIDTH, WIDTH_TILE)
    values = load_rows(v, position, on, v_position, v_channel, VALUE_WIDTH, VALUE_TILE)

    # The blocks whose windows reach the patch. Of positive numbers: Triton divides towards zero.
    first_row, first_column = tl.maximum(top - HALO, 0) // BLOCK, tl.maximum(left - HALO, 0) // BLOCK
    last_row = tl.minimum((top + PATCH - 1 + HALO) // BLOCK, rows - 1)
    across = tl.minimum((left + PATCH - 1 + HALO) // BLOCK, columns - 1) - first_column + 1
    tiles: tl.constexpr = (SIDE * SIDE + QUERIES - 1) // QUERIES
    key_sums = tl.zeros((keys, WIDTH_TILE), tl.float32)
    value_sums = tl.zeros((keys, VALUE_TILE), tl.float32)
    for turn in range((last_row - first_row + 1) * across * tiles):
        block, within = turn // tiles, turn % tiles * QUERIES + tl.arange(0, QUERIES)
        row, column, i, j = first_row + block // across, first_column + block % across, within // SIDE, within % SIDE
        query_y, query_x = row * SIDE + i, column * SIDE + j
        exists = (within < SIDE * SIDE) & (query_y < q_height) & (query_x < q_width)
        there = query_y * q_width + query_x
        own = there * heads + head
        # Of rows and columns of the patch. Those outside the window do not count.
        key_i, key_j = top - row * BLOCK + _before(HALO) + side, left - column * BLOCK + _before(HALO) + side
        at = axis_scores + own[:, None] * (2 * length)
        row_scores = tl.load(at + key_i, mask=exists[:, None] & (key_i >= 0) & (key_i < length), other=-float("inf"))
        column_scores = tl.load(at + (length + key_j), mask=exists[:, None] & (key_j >= 0) & (key_j < length), other=-float("inf"))
        of_positions = tl.trans(tl.reshape(row_scores[:, :, None] + column_scores[:, None, :], (QUERIES, keys)))

        queries = load_rows(q, there, exists, q_position, q_channel, WIDTH, WIDTH_TILE)
        above = load_rows(grad, there, exists, grad_position, grad_channel, VALUE_WIDTH, VALUE_TILE)
        share = tl.load(shares + per_query + own, mask=exists, other=0.0)
        attention = tl.exp2(products(key_rows, queries, PRECISION) * (scale * LOG2_E) + of_positions)
        grad_scores = attention * (products(values, above, PRECISION) - share)
        value_sums = tl.dot(attention.to(above.dtype), above, value_sums, input_precision=PRECISION)
        key_sums = tl.dot(grad_scores.to(queries.dtype), queries, key_sums, input_precision=PRECISION)

    grad_k += batch * height * width * heads * WIDTH + head * WIDTH
    grad_v += batch * height * width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    store_rows(grad_k, key_sums * scale, position, on, heads * WIDTH, WIDTH, WIDTH_TILE)
    store_rows(grad_v, value_sums, position, on, heads * VALUE_WIDTH, VALUE_WIDTH, VALUE_TILE)


class _Problem:
    """What all kernels on tensors of these shapes are launched with."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, block: int, halo: int, scale: float):
        (self.batch, q_height, q_width, self.heads, width), (height, map_width), value_width = q.shape, k.shape[1:3], v.shape[4]
        self.size, window = (height, map_width), block + 2 * halo
        self.side = rel_h.shape[0] - window + 1
        self.rows, self.columns = triton.cdiv(height, block), triton.cdiv(map_width, block)
        tiles = [max(SMALLEST_TILE, triton.next_power_of_2(n)) for n in (width, value_width)]
        self.arguments = dict(
            scale=scale, heads=self.heads, columns=self.columns, height=height, width=map_width, q_height=q_height, q_width=q_width,
            **_strides("q", q), **_strides("k", k), **_strides("v", v), BLOCK=block, HALO=halo, SIDE=self.side,
            PRECISION=float32_precision(q.device), WIDTH=width, WIDTH_TILE=tiles[0], VALUE_WIDTH=value_width, VALUE_TILE=tiles[1])
        self.query_arguments = self.arguments | dict(
            WINDOW_TILE=max(8, triton.next_power_of_2(window)), OFFSET_TILE=max(SMALLEST_TILE, triton.next_power_of_2(rel_h.shape[0])))
        held = min(LARGEST_TILE, max(SMALLEST_TILE, triton.next_power_of_2(self.side**2)))
        self.key = f"queries{held} {8 * q.itemsize}-bit {max(tiles)}"

    def query_grid(self, chosen: dict[str, Any]) -> tuple[int, int]:
        return self.heads * self.rows * self.columns * triton.cdiv(self.side**2, chosen["QUERIES"]), self.batch

    def key_grid(self, chosen: dict[str, Any]) -> tuple[int, int]:
        return self.heads * math.prod(triton.cdiv(n, chosen["PATCH"]) for n in self.size), self.batch


def _strides(name: str, x: Tensor) -> dict[str, int | None]:
    strides = x.stride(0), position_stride(x), x.stride(3), x.stride(4)
    return {f"{name}_{axis}": stride for axis, stride in zip(("batch", "position", "head", "channel"), strides, strict=True)}


@planned
def _forward_plan(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, block: int, halo: int, scale: float) -> Prepared:
    problem = _Problem(q, k, v, rel_h, block, halo, scale)
    return Prepared(halo_attention_forward, q.device, problem.query_grid, problem.key, ("q", "k", "v", "table", "out", "logsumexp"),
                    **problem.query_arguments)


@planned
def _backward_plan(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, block: int, halo: int, scale: float
) -> tuple[Prepared, Prepared, int]:
    """Of the gradient of queries, and of keys and values, and how many programs the former has."""
    problem = _Problem(q, k, v, rel_h, block, halo, scale)
    maps = "grad", "q", "k", "v", "shares", "axis_scores"
    of_queries = Prepared(
        halo_attention_backward_queries, q.device, problem.query_grid, problem.key,
        (*maps, "logsumexp", "table", "out", "grad_q", "grad_table"), **problem.query_arguments, **_strides("grad", grad),
        AXIS_TILE=triton.next_power_of_2(_length(block, halo)))
    of_keys = Prepared(halo_attention_backward_keys, q.device, problem.key_grid, problem.key, (*maps, "grad_k", "grad_v"),
                       **problem.arguments, **_strides("grad", grad), rows=problem.rows)
    return of_queries, of_keys, math.prod(problem.query_grid(of_queries.configuration))


@torch.library.custom_op("zoo::halo_attention_triton", mutates_args=())
def halo_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.halo_attention`. Also returns the logarithm to base 2 of the softmax's denominators, (B, H/s, W/s, heads)."""
    q, k, v = map(even, (q, k, v))
    out, logsumexp = _empty_results(q, v)
    table = torch.cat((rel_h, rel_w)).float()
    _forward_plan(q, k, v, rel_h, block, halo, scale)(q, k, v, table, out, logsumexp)
    return out, logsumexp


@halo_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:4], v.shape[4]), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op("zoo::halo_attention_triton_backward", mutates_args=())
def halo_attention_triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rel_h and rel_w."""
    if autocasting(q.device.type):  # asked first, as the context takes longer than a launch
        with torch.autocast(q.device.type, enabled=False):
            return _gradients(grad, q, k, v, rel_h, rel_w, block, halo, scale, out, logsumexp)
    return _gradients(grad, q, k, v, rel_h, rel_w, block, halo, scale, out, logsumexp)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad if grad.stride(4) == 1 else grad.contiguous()  # read twice, and channels one by one cost more than a copy
    grad, q, k, v = map(even, (grad, q, k, v))
    of_queries, of_keys, programs = _backward_plan(grad, q, k, v, rel_h, block, halo, scale)
    grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    axis_scores = logsumexp.new_empty(*logsumexp.shape, 2, _length(block, halo))
    table, shares = torch.cat((rel_h, rel_w)).float(), torch.empty_like(logsumexp)
    grad_table = table.new_empty(programs, *table.shape)
    of_queries(grad, q, k, v, shares, axis_scores, logsumexp, table, out, grad_q, grad_table)
    of_keys(grad, q, k, v, shares, axis_scores, grad_k, grad_v)

    grad_rel_h, grad_rel_w = (x.to(rel_h.dtype, copy=True) for x in grad_table.sum(0).chunk(2))
    return grad_q, grad_k, grad_v, grad_rel_h, grad_rel_w


@halo_attention_triton_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v, grad_rel_h, grad_rel_w = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, rel_h, rel_w))
    return grad_q, grad_k, grad_v, grad_rel_h, grad_rel_w


call = register_gradient(halo_attention, halo_attention_triton_backward, reference.halo_attention, reference.flops, kept=(0, 1))


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels. float16 is compiled as bfloat16 is."""
    half, single, halo = torch.bfloat16, torch.float32, 3
    heads = (half, 16), (half, 64), (half, 128), (single, 32), (single, 64)
    for (block, stride), (dtype, width) in itertools.product(((8, 1), (8, 2), (10, 2)), heads):
        k = torch.zeros(1, 2 * block, 2 * block, 2, width, dtype=dtype, requires_grad=True)
        table = torch.zeros(block + 2 * halo + block // stride - 1, width, requires_grad=True)

        def run(arguments=(k[:, ::stride, ::stride], k, k, table, table, block, halo, 1.0)) -> None:
            halo_attention(*arguments)[0].sum().backward()

        yield f"{name_of(dtype)}, {width} channels a head, blocks of {block} with halo {halo}, stride {stride}", run
