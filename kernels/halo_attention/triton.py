"""Halo attention in Triton: keys and values are read where they lie.

A program holds a tile of queries of one block and goes over the keys of its window with a running softmax. The backward pass
recomputes the attention from its logarithmic denominator, once for the gradient of the queries and once for that of keys and
values: there a program holds a patch of keys and goes over the queries of the blocks whose windows reach it, so that nothing is
added atomically.

The scores of relative positions are those of a query and an offset: a product of queries and tables, L = w + s − 1 numbers for
the rows and as many for the columns of a query, which the kernels read. What reaches them in the backward pass is summed per
query, and the tables' gradients are again products.
"""
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import name_of
from .._launch import float32_precision, launch
from .._tiles import load_rows, products, store_rows

LOG2_E = tl.constexpr(math.log2(math.e))
SMALLEST_TILE, LARGEST_TILE = 16, 64  # queries that a program holds; matrix units take 16


@triton.jit
def _queries_of(tile, columns, q_height, q_width, SIDE: tl.constexpr, QUERIES: tl.constexpr):
    """A tile of the queries of a block: the block's row and column, theirs in it, where they lie, and whether on the map."""
    tiles: tl.constexpr = (SIDE * SIDE + QUERIES - 1) // QUERIES
    place = tile % tiles * QUERIES + tl.arange(0, QUERIES)
    row, column, i, j = tile // tiles // columns, tile // tiles % columns, place // SIDE, place % SIDE
    y, x = row * SIDE + i, column * SIDE + j
    return row, column, i, j, y * q_width + x, (place < SIDE * SIDE) & (y < q_height) & (x < q_width)


@triton.jit
def _keys_of(first, row, column, height, width, BLOCK: tl.constexpr, HALO: tl.constexpr, KEYS: tl.constexpr):
    """Some keys of a block's window: row and column in it, where they lie, whether on the map, and whether within the border."""
    window: tl.constexpr = BLOCK + 2 * HALO
    place = first + tl.arange(0, KEYS)
    i, j = place // window, place % window
    y, x = row * BLOCK + i - HALO, column * BLOCK + j - HALO
    seen = (place < window * window) & (y < height + HALO) & (x < width + HALO)
    return i, j, y * width + x, seen & (y >= 0) & (y < height) & (x >= 0) & (x < width), seen


@triton.jit
def halo_attention_forward(
    q, k, v, logits, out, logsumexp, scale, heads, columns, height, width, q_height, q_width,
    q_batch, q_position, q_head, q_channel, k_batch, k_position, k_head, k_channel, v_batch, v_position, v_head, v_channel,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_TILE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """One program per tile of queries and head, and batch."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    window: tl.constexpr = BLOCK + 2 * HALO
    offsets: tl.constexpr = window + SIDE - 1
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    per_query = batch * q_height * q_width * heads
    logits += per_query * (2 * offsets)
    row, column, i, j, position, on = _queries_of(tile, columns, q_height, q_width, SIDE, QUERIES)
    own = position * heads + head
    by_row, by_column = own * (2 * offsets) + SIDE - 1 - i, own * (2 * offsets) + offsets + SIDE - 1 - j
    queries = load_rows(q, position, on, q_position, q_channel, WIDTH, WIDTH_TILE)

    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, VALUE_TILE), tl.float32)
    for first in range(0, window * window, KEYS):
        key_i, key_j, there, exists, seen = _keys_of(first, row, column, height, width, BLOCK, HALO, KEYS)
        scores = products(queries, load_rows(k, there, exists, k_position, k_channel, WIDTH, WIDTH_TILE), PRECISION)
        pairs = on[:, None] & seen
        scores = scores * (scale * LOG2_E) + tl.load(logits + (by_row[:, None] + key_i), mask=pairs, other=0.0)
        scores = tl.where(seen, scores + tl.load(logits + (by_column[:, None] + key_j), mask=pairs, other=0.0), -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        exponentials = tl.exp2(scores - above[:, None])
        fade = tl.exp2(highest - above)
        highest, total = above, total * fade + tl.sum(exponentials, 1)
        values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_TILE)
        sums = tl.dot(exponentials.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)

    out += batch * q_height * q_width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    store_rows(out, sums / total[:, None], position, on, heads * VALUE_WIDTH, VALUE_WIDTH, VALUE_TILE)
    tl.store(logsumexp + per_query + own, highest + tl.log2(total), mask=on)


@triton.jit
def halo_attention_backward_queries(
    grad, q, k, v, logits, out, logsumexp, shares, grad_q, grad_logits, scale, heads, columns, height, width, q_height, q_width,
    grad_batch, grad_position, grad_head, grad_channel,
    q_batch, q_position, q_head, q_channel, k_batch, k_position, k_head, k_channel, v_batch, v_position, v_head, v_channel,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_TILE: tl.constexpr,
    WINDOW_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """As the forward kernel. Also keeps every query's share, the sum of its gradient times its output."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    window: tl.constexpr = BLOCK + 2 * HALO
    offsets: tl.constexpr = window + SIDE - 1
    grad += batch * grad_batch + head * grad_head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    per_query = batch * q_height * q_width * heads
    logits += per_query * (2 * offsets)
    row, column, i, j, position, on = _queries_of(tile, columns, q_height, q_width, SIDE, QUERIES)
    own = position * heads + head
    by_row, by_column = own * (2 * offsets) + SIDE - 1 - i, own * (2 * offsets) + offsets + SIDE - 1 - j
    queries = load_rows(q, position, on, q_position, q_channel, WIDTH, WIDTH_TILE)
    above = load_rows(grad, position, on, grad_position, grad_channel, VALUE_WIDTH, VALUE_TILE)
    out += batch * q_height * q_width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    result = load_rows(out, position, on, heads * VALUE_WIDTH, 1, VALUE_WIDTH, VALUE_TILE)
    share = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(shares + per_query + own, share, mask=on)
    denominator = tl.load(logsumexp + per_query + own, mask=on, other=0.0)

    line = tl.arange(0, 2 * WINDOW_TILE)  # of the window: its rows, then its columns
    sums = tl.zeros((QUERIES, WIDTH_TILE), tl.float32)
    line_sums = tl.zeros((QUERIES, 2 * WINDOW_TILE), tl.float32)
    for first in range(0, window * window, KEYS):
        key_i, key_j, there, exists, seen = _keys_of(first, row, column, height, width, BLOCK, HALO, KEYS)
        key_rows = load_rows(k, there, exists, k_position, k_channel, WIDTH, WIDTH_TILE)
        values = load_rows(v, there, exists, v_position, v_channel, VALUE_WIDTH, VALUE_TILE)
        pairs = on[:, None] & seen
        scores = products(queries, key_rows, PRECISION) * (scale * LOG2_E)
        scores += tl.load(logits + (by_row[:, None] + key_i), mask=pairs, other=0.0)
        scores += tl.load(logits + (by_column[:, None] + key_j), mask=pairs, other=0.0)
        attention = tl.exp2(tl.where(pairs, scores - denominator[:, None], -float("inf")))
        grad_scores = attention * (products(above, values, PRECISION) - share[:, None])
        grad_scores = grad_scores.to(key_rows.dtype)
        sums = tl.dot(grad_scores, key_rows, sums, input_precision=PRECISION)
        on_line = tl.where((key_i[:, None] == line) | (key_j[:, None] == line - WINDOW_TILE), 1.0, 0.0)
        line_sums = tl.dot(grad_scores, on_line.to(key_rows.dtype), line_sums, input_precision=PRECISION)

    grad_q += batch * q_height * q_width * heads * WIDTH + head * WIDTH
    store_rows(grad_q, sums * scale, position, on, heads * WIDTH, WIDTH, WIDTH_TILE)
    place = tl.where(line < WINDOW_TILE, by_row[:, None] + line, by_column[:, None] + line - WINDOW_TILE)
    tl.store(grad_logits + per_query * (2 * offsets) + place, line_sums, mask=on[:, None] & (line % WINDOW_TILE < window))


@triton.jit
def halo_attention_backward_keys(
    grad, q, k, v, logits, logsumexp, shares, grad_k, grad_v, scale, heads, rows, columns, height, width, q_height, q_width,
    grad_batch, grad_position, grad_head, grad_channel,
    q_batch, q_position, q_head, q_channel, k_batch, k_position, k_head, k_channel, v_batch, v_position, v_head, v_channel,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_TILE: tl.constexpr,
    QUERIES: tl.constexpr, PATCH: tl.constexpr,
):
    """One program per patch of PATCH × PATCH keys and head, and batch; scores and attention are (keys, queries) here."""
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    window: tl.constexpr = BLOCK + 2 * HALO
    offsets: tl.constexpr = window + SIDE - 1
    keys: tl.constexpr = PATCH * PATCH
    grad += batch * grad_batch + head * grad_head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    per_query = batch * q_height * q_width * heads
    logits += per_query * (2 * offsets)
    patches, place = tl.cdiv(width, PATCH), tl.arange(0, keys)
    top, left = tile // patches * PATCH, tile % patches * PATCH
    y, x = top + place // PATCH, left + place % PATCH
    position, on = y * width + x, (y < height) & (x < width)
    key_rows = load_rows(k, position, on, k_position, k_channel, WIDTH, WIDTH_TILE)
    values = load_rows(v, position, on, v_position, v_channel, VALUE_WIDTH, VALUE_TILE)

    # The blocks whose windows reach the patch. Of positive numbers: Triton divides towards zero.
    first_row, first_column = tl.maximum(top - HALO, 0) // BLOCK, tl.maximum(left - HALO, 0) // BLOCK
    last_row = tl.minimum((top + PATCH - 1 + HALO) // BLOCK, rows - 1)
    across = tl.minimum((left + PATCH - 1 + HALO) // BLOCK, columns - 1) - first_column + 1
    count = (last_row - first_row + 1) * across * SIDE * SIDE
    key_sums = tl.zeros((keys, WIDTH_TILE), tl.float32)
    value_sums = tl.zeros((keys, VALUE_TILE), tl.float32)
    for first in range(0, count, QUERIES):
        entry = first + tl.arange(0, QUERIES)
        block, within = entry // (SIDE * SIDE), entry % (SIDE * SIDE)
        row, column, i, j = first_row + block // across, first_column + block % across, within // SIDE, within % SIDE
        query_y, query_x = row * SIDE + i, column * SIDE + j
        exists = (entry < count) & (query_y < q_height) & (query_x < q_width)
        there = query_y * q_width + query_x
        own = there * heads + head
        key_i, key_j = y[:, None] - (row * BLOCK - HALO), x[:, None] - (column * BLOCK - HALO)
        pairs = exists & on[:, None] & (key_i >= 0) & (key_i < window) & (key_j >= 0) & (key_j < window)

        queries = load_rows(q, there, exists, q_position, q_channel, WIDTH, WIDTH_TILE)
        above = load_rows(grad, there, exists, grad_position, grad_channel, VALUE_WIDTH, VALUE_TILE)
        denominator = tl.load(logsumexp + per_query + own, mask=exists, other=0.0)
        share = tl.load(shares + per_query + own, mask=exists, other=0.0)
        scores = products(key_rows, queries, PRECISION) * (scale * LOG2_E)
        scores += tl.load(logits + (own * (2 * offsets) + SIDE - 1 - i + key_i), mask=pairs, other=0.0)
        scores += tl.load(logits + (own * (2 * offsets) + offsets + SIDE - 1 - j + key_j), mask=pairs, other=0.0)
        attention = tl.exp2(tl.where(pairs, scores - denominator, -float("inf")))
        grad_scores = attention * (products(values, above, PRECISION) - share)
        value_sums = tl.dot(attention.to(above.dtype), above, value_sums, input_precision=PRECISION)
        key_sums = tl.dot(grad_scores.to(queries.dtype), queries, key_sums, input_precision=PRECISION)

    grad_k += batch * height * width * heads * WIDTH + head * WIDTH
    grad_v += batch * height * width * heads * VALUE_WIDTH + head * VALUE_WIDTH
    store_rows(grad_k, key_sums * scale, position, on, heads * WIDTH, WIDTH, WIDTH_TILE)
    store_rows(grad_v, value_sums, position, on, heads * VALUE_WIDTH, VALUE_WIDTH, VALUE_TILE)


class _Problem:
    """What all kernels of one call are launched with."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float):
        (self.batch, q_height, q_width, self.heads, width), (height, map_width), value_width = q.shape, k.shape[1:3], v.shape[4]
        self.size, self.window = (height, map_width), block + 2 * halo
        self.side = rel_h.shape[0] - self.window + 1
        self.rows, self.columns = triton.cdiv(height, block), triton.cdiv(map_width, block)
        self.table = torch.cat((rel_h, rel_w)).float()
        tiles = [max(SMALLEST_TILE, triton.next_power_of_2(n)) for n in (width, value_width)]
        self.arguments = dict(
            logits=q.float() @ (self.table * LOG2_E.value).t(), scale=scale, heads=self.heads, columns=self.columns,
            height=height, width=map_width, q_height=q_height, q_width=q_width, **_maps(q=q, k=k, v=v), BLOCK=block, HALO=halo,
            SIDE=self.side, PRECISION=float32_precision(q.device), WIDTH=width, WIDTH_TILE=tiles[0], VALUE_WIDTH=value_width,
            VALUE_TILE=tiles[1])
        held = min(LARGEST_TILE, max(SMALLEST_TILE, triton.next_power_of_2(self.side**2)))
        self.key = f"queries{held} {8 * q.itemsize}-bit {max(tiles)}"

    def query_grid(self, chosen: dict[str, Any]) -> tuple[int, int]:
        return self.heads * self.rows * self.columns * triton.cdiv(self.side**2, chosen["QUERIES"]), self.batch

    def key_grid(self, chosen: dict[str, Any]) -> tuple[int, int]:
        return self.heads * math.prod(triton.cdiv(n, chosen["PATCH"]) for n in self.size), self.batch


def _maps(**maps: Tensor) -> dict[str, Tensor | int]:
    """Maps with their positions in one dimension, a view where rows lie evenly, and their strides."""
    arguments = {}
    for name, x in maps.items():
        x = x.flatten(1, 2)
        strides = zip(("batch", "position", "head", "channel"), x.stride(), strict=True)
        arguments |= {name: x} | {f"{name}_{axis}": stride for axis, stride in strides}
    return arguments


@torch.library.custom_op("zoo::halo_attention_triton", mutates_args=())
def halo_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.halo_attention`. Also returns the logarithm to base 2 of the softmax's denominators, (B, H/s, W/s, heads)."""
    out, logsumexp = _empty_results(q, v)
    with torch.autocast(q.device.type, enabled=False):
        problem = _Problem(q, k, v, rel_h, rel_w, block, halo, scale)
    launch(halo_attention_forward, problem.query_grid, problem.key, out=out, logsumexp=logsumexp, **problem.arguments)
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
    with torch.autocast(q.device.type, enabled=False):
        return _gradients(grad, _Problem(q, k, v, rel_h, rel_w, block, halo, scale), q, k, v, rel_h, out, logsumexp)


def _gradients(
    grad: Tensor, problem: _Problem, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    grad_q = torch.empty_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
    shared = problem.arguments | _maps(grad=grad) | dict(logsumexp=logsumexp, shares=torch.empty_like(logsumexp))
    grad_logits = torch.zeros_like(shared["logits"])
    launch(halo_attention_backward_queries, problem.query_grid, problem.key, **shared, out=out, grad_q=grad_q, grad_logits=grad_logits,
           WINDOW_TILE=max(SMALLEST_TILE, triton.next_power_of_2(problem.window)))
    launch(halo_attention_backward_keys, problem.key_grid, problem.key, **shared, rows=problem.rows, grad_k=grad_k, grad_v=grad_v)

    grad_logits = grad_logits.flatten(0, 3)
    grad_q.view(-1, q.shape[4]).addmm_(grad_logits, problem.table)
    grad_table = grad_logits.t() @ q.float().flatten(0, 3)
    return grad_q.to(q.dtype), grad_k, grad_v, *(x.to(rel_h.dtype, copy=True) for x in grad_table.chunk(2))


@halo_attention_triton_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, rel_h, rel_w))


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block, ctx.halo, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, logsumexp = ctx.saved_tensors
    return *halo_attention_triton_backward(grad, *tensors, ctx.block, ctx.halo, ctx.scale, out, logsumexp), None, None, None


halo_attention.register_autograd(_backward, setup_context=_setup_context)


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels. float16 is compiled as bfloat16 is."""
    half, single, halo = torch.bfloat16, torch.float32, 3
    heads = (half, 16), (half, 64), (half, 128), (single, 32), (single, 64), (single, 128)
    for (block, stride), (dtype, width) in itertools.product(((8, 1), (8, 2), (10, 2)), heads):
        k = torch.zeros(1, 2 * block, 2 * block, 2, width, dtype=dtype, requires_grad=True)
        table = torch.zeros(block + 2 * halo + block // stride - 1, width, requires_grad=True)

        def run(arguments=(k[:, ::stride, ::stride], k, k, table, table, block, halo, 1.0)) -> None:
            halo_attention(*arguments)[0].sum().backward()

        yield f"{name_of(dtype)}, {width} channels a head, blocks of {block} with halo {halo}, stride {stride}", run
