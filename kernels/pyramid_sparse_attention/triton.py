"""Pyramid sparse attention in Triton: of a block of queries, the rows that it keeps follow each other, whatever blocks they are of.

The blocks are sorted by level. A program holds a tile of queries of one block and goes over the rows of its levels in full tiles: which
block a row is of, it reads from the sorted list. The backward pass recomputes the attention from its logarithmic denominator, once for
the gradient of the queries and once for that of keys and values: there a program holds rows of one level of one block, and goes over
the blocks of queries that keep them, so that nothing is added atomically.
"""
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import name_of, register_gradient
from .._launch import Prepared, float32_precision, planned
from .._tiles import load_rows, products, store_rows
from . import reference
from ._pyramid import LEVELS, pyramid

LOG2_E = tl.constexpr(math.log2(math.e))
SMALLEST_TILE = 16  # channels of a head that matrix units take
IN_A_TURN = dict.fromkeys(  # scores that a turn of the inner loop works out
    ("pyramid_sparse_attention_forward", "pyramid_sparse_attention_backward_queries", "pyramid_sparse_attention_backward_keys"),
    ("QUERIES", "KEYS"))

# A row of another number of tokens compiles nothing anew, as it would if 16 divided one and not the other.
kernel = triton.jit(do_not_specialize=["queries", "tokens", "query_blocks", "key_blocks"])


@triton.jit
def _turns(starts, KEY_BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """After how many tiles of rows each level ends."""
    start = tl.load(starts)
    end = tl.load(starts + 1)
    first = tl.cdiv((end - start) * KEY_BLOCK, KEYS).to(tl.int32)
    start, end = end, tl.load(starts + 2)
    second = first + tl.cdiv((end - start) * (KEY_BLOCK // 2), KEYS).to(tl.int32)
    start, end = end, tl.load(starts + 3)
    third = second + tl.cdiv((end - start) * (KEY_BLOCK // 4), KEYS).to(tl.int32)
    start, end = end, tl.load(starts + 4)
    return first, second, third, third + tl.cdiv((end - start) * (KEY_BLOCK // 8), KEYS).to(tl.int32)


@triton.jit
def _row(level, place, padded):
    """Where rows of a level lie in the pyramid of so many tokens."""
    return 2 * padded - (2 * padded >> level) + place


@triton.jit
def _counts(level, place, tokens):
    """How many tokens rows of a level are the mean of, 0 or less beyond the tokens."""
    return tl.minimum(tokens - (place << level), tl.full((), 1, tl.int32) << level)


@triton.jit
def _kept(turn, first, second, third, order, starts, tokens, padded, KEY_BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """A tile of the rows that a block of queries keeps: where they lie, which there are, and the logarithms of what they count."""
    level = (turn >= first).to(tl.int32) + (turn >= second).to(tl.int32) + (turn >= third).to(tl.int32)
    before = tl.where(level == 0, 0, tl.where(level == 1, first, tl.where(level == 2, second, third)))
    start = tl.load(starts + level).to(tl.int32)
    end = tl.load(starts + level + 1).to(tl.int32)
    place = (turn - before) * KEYS + tl.arange(0, KEYS)
    entry = (place << level) // KEY_BLOCK
    exists = start + entry < end
    block = tl.load(order + start + entry, mask=exists, other=0).to(tl.int32)
    place += (block - entry) * (KEY_BLOCK >> level)
    count = _counts(level, place, tokens)
    exists &= count > 0
    return _row(level, place, padded), exists, tl.where(exists, tl.log2(tl.maximum(count, 1).to(tl.float32)), -float("inf"))


@kernel
def pyramid_sparse_attention_forward(
    q, k, v, order, starts, out, logsumexp, scale, heads, queries, tokens, query_blocks, key_blocks, q_batch, q_head, q_token, q_channel,
    PRECISION: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """One program per tile of queries of a block and head, and batch; k and v are pyramids, and contiguous."""
    tiles: tl.constexpr = (QUERY_BLOCK + QUERIES - 1) // QUERIES
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    padded, of_head, block = key_blocks * KEY_BLOCK, batch * heads + head, tile // tiles
    rows = padded + padded // 8 * 7
    q += batch * q_batch + head * q_head
    k += of_head * rows * WIDTH
    v += of_head * rows * VALUE_WIDTH
    order += (of_head * query_blocks + block) * key_blocks
    starts += (of_head * query_blocks + block) * 5
    place = tile % tiles * QUERIES + tl.arange(0, QUERIES)
    position = block * QUERY_BLOCK + place
    on = (place < QUERY_BLOCK) & (position < queries)
    own = load_rows(q, position, on, q_token, q_channel, WIDTH, BLOCK)

    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, VALUE_BLOCK), tl.float32)
    first, second, third, turns = _turns(starts, KEY_BLOCK, KEYS)
    for turn in range(turns):
        there, exists, bias = _kept(turn, first, second, third, order, starts, tokens, padded, KEY_BLOCK, KEYS)
        scores = products(own, load_rows(k, there, exists, WIDTH, 1, WIDTH, BLOCK), PRECISION) * (scale * LOG2_E) + bias[None, :]
        values = load_rows(v, there, exists, VALUE_WIDTH, 1, VALUE_WIDTH, VALUE_BLOCK)
        maximum = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)  # nothing kept yet
        exponentials = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(highest - shift)
        total = total * fade + tl.sum(exponentials, 1)
        sums = tl.dot(exponentials.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)
        highest = maximum

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out += of_head * queries * VALUE_WIDTH
    store_rows(out, sums / total[:, None], position, on, VALUE_WIDTH, VALUE_WIDTH, VALUE_BLOCK)
    tl.store(logsumexp + of_head * queries + position, tl.where(nothing, 0.0, highest + tl.log2(total)), mask=on)


@kernel
def pyramid_sparse_attention_backward_queries(
    grad, q, k, v, order, starts, out, logsumexp, shares, grad_q, scale, heads, queries, tokens, query_blocks, key_blocks,
    grad_batch, grad_head, grad_token, grad_channel, q_batch, q_head, q_token, q_channel,
    PRECISION: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """As the forward kernel. Also keeps every query's share, the sum of its gradient times its output."""
    tiles: tl.constexpr = (QUERY_BLOCK + QUERIES - 1) // QUERIES
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    padded, of_head, block = key_blocks * KEY_BLOCK, batch * heads + head, tile // tiles
    rows = padded + padded // 8 * 7
    q += batch * q_batch + head * q_head
    grad += batch * grad_batch + head * grad_head
    k += of_head * rows * WIDTH
    v += of_head * rows * VALUE_WIDTH
    order += (of_head * query_blocks + block) * key_blocks
    starts += (of_head * query_blocks + block) * 5
    place = tile % tiles * QUERIES + tl.arange(0, QUERIES)
    position = block * QUERY_BLOCK + place
    on = (place < QUERY_BLOCK) & (position < queries)
    own = load_rows(q, position, on, q_token, q_channel, WIDTH, BLOCK)
    above = load_rows(grad, position, on, grad_token, grad_channel, VALUE_WIDTH, VALUE_BLOCK)
    result = load_rows(out + of_head * queries * VALUE_WIDTH, position, on, VALUE_WIDTH, 1, VALUE_WIDTH, VALUE_BLOCK)
    share = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(shares + of_head * queries + position, share, mask=on)
    denominator = tl.load(logsumexp + of_head * queries + position, mask=on, other=float("inf"))  # where is no query is no attention

    sums = tl.zeros((QUERIES, BLOCK), tl.float32)
    first, second, third, turns = _turns(starts, KEY_BLOCK, KEYS)
    for turn in range(turns):
        there, exists, bias = _kept(turn, first, second, third, order, starts, tokens, padded, KEY_BLOCK, KEYS)
        key_rows = load_rows(k, there, exists, WIDTH, 1, WIDTH, BLOCK)
        values = load_rows(v, there, exists, VALUE_WIDTH, 1, VALUE_WIDTH, VALUE_BLOCK)
        scores = products(own, key_rows, PRECISION) * (scale * LOG2_E) + bias[None, :]
        attention = tl.exp2(scores - denominator[:, None])
        grad_scores = attention * (products(above, values, PRECISION) - share[:, None])
        sums = tl.dot(grad_scores.to(key_rows.dtype), key_rows, sums, input_precision=PRECISION)
    store_rows(grad_q + of_head * queries * WIDTH, sums * scale, position, on, WIDTH, WIDTH, BLOCK)


@kernel
def pyramid_sparse_attention_backward_keys(
    grad, q, k, v, order, starts, logsumexp, shares, grad_k, grad_v, scale, heads, queries, tokens, query_blocks, key_blocks,
    grad_batch, grad_head, grad_token, grad_channel, q_batch, q_head, q_token, q_channel,
    PRECISION: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """One program per tile of rows of a level of a block and head, and batch; scores and attention are (rows, queries) here."""
    ones: tl.constexpr = (KEY_BLOCK + KEYS - 1) // KEYS  # tiles of a block in each level
    twos: tl.constexpr = (KEY_BLOCK // 2 + KEYS - 1) // KEYS
    fours: tl.constexpr = (KEY_BLOCK // 4 + KEYS - 1) // KEYS
    eights: tl.constexpr = (KEY_BLOCK // 8 + KEYS - 1) // KEYS
    tiles: tl.constexpr = (QUERY_BLOCK + QUERIES - 1) // QUERIES
    tile, head, batch = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    block, tile = tile // (ones + twos + fours + eights), tile % (ones + twos + fours + eights)
    level = (tile >= ones).to(tl.int32) + (tile >= ones + twos).to(tl.int32) + (tile >= ones + twos + fours).to(tl.int32)
    tile -= tl.where(level == 0, 0, tl.where(level == 1, ones, tl.where(level == 2, ones + twos, ones + twos + fours)))
    padded, of_head = key_blocks * KEY_BLOCK, batch * heads + head
    rows = padded + padded // 8 * 7
    q += batch * q_batch + head * q_head
    grad += batch * grad_batch + head * grad_head
    order += (of_head * key_blocks + block) * query_blocks
    starts += (of_head * key_blocks + block) * 5
    place = tile * KEYS + tl.arange(0, KEYS)
    within = place < (KEY_BLOCK >> level)
    place += block * (KEY_BLOCK >> level)
    count = _counts(level, place, tokens)
    on = within & (count > 0)
    bias = tl.where(on, tl.log2(tl.maximum(count, 1).to(tl.float32)), -float("inf"))
    there = _row(level, place, padded)
    key_rows = load_rows(k + of_head * rows * WIDTH, there, on, WIDTH, 1, WIDTH, BLOCK)
    values = load_rows(v + of_head * rows * VALUE_WIDTH, there, on, VALUE_WIDTH, 1, VALUE_WIDTH, VALUE_BLOCK)

    key_sums = tl.zeros((KEYS, BLOCK), tl.float32)
    value_sums = tl.zeros((KEYS, VALUE_BLOCK), tl.float32)
    start = tl.load(starts + level).to(tl.int32)
    end = tl.load(starts + level + 1).to(tl.int32)
    for turn in range((end - start) * tiles):
        of_queries = tl.load(order + start + turn // tiles).to(tl.int32)
        j = turn % tiles * QUERIES + tl.arange(0, QUERIES)
        position = of_queries * QUERY_BLOCK + j
        exists = (j < QUERY_BLOCK) & (position < queries)
        own = load_rows(q, position, exists, q_token, q_channel, WIDTH, BLOCK)
        above = load_rows(grad, position, exists, grad_token, grad_channel, VALUE_WIDTH, VALUE_BLOCK)
        denominator = tl.load(logsumexp + of_head * queries + position, mask=exists, other=float("inf"))
        share = tl.load(shares + of_head * queries + position, mask=exists, other=0.0)
        scores = products(key_rows, own, PRECISION) * (scale * LOG2_E) + bias[:, None]
        attention = tl.exp2(scores - denominator[None, :])
        grad_scores = attention * (products(values, above, PRECISION) - share[None, :])
        value_sums = tl.dot(attention.to(above.dtype), above, value_sums, input_precision=PRECISION)
        key_sums = tl.dot(grad_scores.to(own.dtype), own, key_sums, input_precision=PRECISION)
    store_rows(grad_k + of_head * rows * WIDTH, key_sums * scale, there, within, WIDTH, WIDTH, BLOCK)
    store_rows(grad_v + of_head * rows * VALUE_WIDTH, value_sums, there, within, VALUE_WIDTH, VALUE_WIDTH, VALUE_BLOCK)


def _by_level(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The last axis sorted by level, as places in it, and where each level begins, (…, 5); at the end lies what is left out."""
    rank = torch.full_like(levels, len(LEVELS), memory_format=torch.contiguous_format)
    for i, level in enumerate(LEVELS):
        rank = rank.masked_fill(levels == level, i)
    ranked, order = rank.sort(stable=True)
    bounds = torch.arange(len(LEVELS) + 1, device=levels.device, dtype=levels.dtype).expand(*levels.shape[:-1], -1).contiguous()
    return order, torch.searchsorted(ranked, bounds)


class _Problem:
    """What all kernels on tensors of these shapes are launched with."""

    def __init__(self, q: Tensor, v: Tensor, tokens: int, query_block: int, key_block: int, scale: float):
        (self.batch, self.heads, queries, width), value_width = q.shape, v.shape[3]
        self.device, self.query_block, self.key_block = q.device, query_block, key_block
        self.query_blocks, self.key_blocks = triton.cdiv(queries, query_block), triton.cdiv(tokens, key_block)
        block, value_block = (max(SMALLEST_TILE, triton.next_power_of_2(n)) for n in (width, value_width))
        self.arguments = dict(
            scale=scale, heads=self.heads, queries=queries, tokens=tokens, query_blocks=self.query_blocks, key_blocks=self.key_blocks,
            **_strides("q", q), PRECISION=float32_precision(q.device), QUERY_BLOCK=query_block, KEY_BLOCK=key_block,
            WIDTH=width, BLOCK=block, VALUE_WIDTH=value_width, VALUE_BLOCK=value_block)
        self.key = f"{8 * q.itemsize}-bit {max(block, value_block)} queries{64 if query_block <= 64 else 128}"

    def over_keys(self, kernel: Callable, tensors: tuple[str, ...], **more: int) -> Prepared:
        """Of a kernel whose programs hold queries."""
        def grid(chosen: dict[str, int]) -> tuple[int, int]:
            return self.heads * self.query_blocks * triton.cdiv(self.query_block, chosen["QUERIES"]), self.batch

        return Prepared(kernel, self.device, grid, self.key, tensors, **self.arguments, **more)

    def over_queries(self, kernel: Callable, tensors: tuple[str, ...], **more: int) -> Prepared:
        """Of a kernel whose programs hold rows of a level."""
        def grid(chosen: dict[str, int]) -> tuple[int, int]:
            tiles = sum(triton.cdiv(self.key_block // level, chosen["KEYS"]) for level in LEVELS)
            return self.heads * self.key_blocks * tiles, self.batch

        return Prepared(kernel, self.device, grid, self.key, tensors, **self.arguments, **more)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip(("batch", "head", "token", "channel"), x.stride(), strict=True)}


@planned
def _forward_plan(q: Tensor, v: Tensor, tokens: int, query_block: int, key_block: int, scale: float) -> Prepared:
    problem = _Problem(q, v, tokens, query_block, key_block, scale)
    return problem.over_keys(pyramid_sparse_attention_forward, ("q", "k", "v", "order", "starts", "out", "logsumexp"))


@planned
def _backward_plan(
    grad: Tensor, q: Tensor, v: Tensor, tokens: int, query_block: int, key_block: int, scale: float
) -> tuple[Prepared, Prepared]:
    """Of the gradients of queries, and of keys and values."""
    problem = _Problem(q, v, tokens, query_block, key_block, scale)
    given, strides = ("grad", "q", "k", "v", "order", "starts"), _strides("grad", grad)
    return (
        problem.over_keys(pyramid_sparse_attention_backward_queries, (*given, "out", "logsumexp", "shares", "grad_q"), **strides),
        problem.over_queries(pyramid_sparse_attention_backward_keys, (*given, "logsumexp", "shares", "grad_k", "grad_v"), **strides))


@torch.library.custom_op("zoo::pyramid_sparse_attention_triton", mutates_args=())
def pyramid_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference`. Also returns the logarithm to base 2 of the softmax's denominators, (B, heads, N)."""
    out, logsumexp = _empty_results(q, v)
    if q.shape[0]:
        k, v = k.contiguous(), v.contiguous()
        _forward_plan(q, v, tokens, query_block, key_block, scale)(q, k, v, *_by_level(levels), out, logsumexp)
    return out, logsumexp


@pyramid_sparse_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("zoo::pyramid_sparse_attention_triton_backward", mutates_args=())
def pyramid_sparse_attention_triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and of the pyramids."""
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if q.shape[0]:
        k, v, shares = k.contiguous(), v.contiguous(), torch.empty_like(logsumexp)
        of_queries, of_keys = _backward_plan(grad, q, v, tokens, query_block, key_block, scale)
        of_queries(grad, q, k, v, *_by_level(levels), out, logsumexp, shares, grad_q)
        of_keys(grad, q, k, v, *_by_level(levels.transpose(2, 3)), logsumexp, shares, grad_k, grad_v)
    return grad_q, grad_k, grad_v


@pyramid_sparse_attention_triton_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return grad_q, grad_k, grad_v


call = register_gradient(
    pyramid_sparse_attention, pyramid_sparse_attention_triton_backward, reference.pyramid_sparse_attention, reference.flops, kept=(0, 1))


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels. float16 is compiled as bfloat16 is."""
    for dtype, width, queries, keys in (
        (torch.bfloat16, 64, 128, 128), (torch.bfloat16, 32, 128, 128), (torch.bfloat16, 128, 128, 128),
        (torch.bfloat16, 64, 64, 32), (torch.bfloat16, 32, 64, 32),
        (torch.float32, 64, 128, 128), (torch.float32, 32, 128, 128), (torch.float32, 128, 128, 128),
    ):
        q, k, v = torch.zeros(1, 160, 6, width, dtype=dtype, requires_grad=True).transpose(1, 2).chunk(3, 1)
        k, v = (pyramid(x, -(-160 // keys), keys) for x in (k, v))
        levels = torch.ones(1, 2, -(-160 // queries), -(-160 // keys), dtype=torch.int32)

        def run(arguments=(q, k, v, levels, 160, queries, keys, 1.0)) -> None:
            pyramid_sparse_attention(*arguments)[0].sum().backward(retain_graph=True)

        yield f"{name_of(dtype)}, {width} channels a head, blocks of {queries} queries and {keys} keys", run
