"""Halo attention some rows of blocks at a time, as an operator with its own gradient.

Windows and scores are held for one step only. The backward pass makes them again, from the logarithm of the softmax's
denominator, and adds the gradients of windows up where they overlap.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = {"cpu": 1 << 18}  # elements of scores, keys and values: 1 MiB of float32, which the caches hold
AT_ONCE_ELSEWHERE = 1 << 26


class _Grid(NamedTuple):
    """The blocks of a map, b × b, with windows of b + 2h; s × s queries each."""

    size: tuple[int, int]
    block: int
    halo: int
    side: int

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo

    @property
    def rows(self) -> int:
        return -(-self.size[0] // self.block)

    @property
    def columns(self) -> int:
        return -(-self.size[1] // self.block)


class _Step(NamedTuple):
    """Some images, and some rows of blocks of them."""

    images: slice
    first: int
    rows: int


def _grid(k: Tensor, rel_h: Tensor, block: int, halo: int) -> _Grid:
    return _Grid(tuple(k.shape[1:3]), block, halo, rel_h.shape[0] - block - 2 * halo + 1)


def _steps(k: Tensor, v: Tensor, grid: _Grid) -> Iterator[tuple[slice, list[_Step]]]:
    """Images to take together, and the steps over their rows of blocks."""
    per_row = k.shape[3] * grid.columns * grid.window**2 * (grid.side**2 + k.shape[4] + v.shape[4])
    at_once = max(1, AT_ONCE.get(k.device.type, AT_ONCE_ELSEWHERE) // per_row)
    count = max(1, at_once // grid.rows)
    for start in range(0, k.shape[0], count):
        images = slice(start, start + count)
        yield images, [_Step(images, row, min(at_once, grid.rows - row)) for row in range(0, grid.rows, at_once)]


def _queries(x: Tensor, step: _Step, grid: _Grid, dtype: torch.dtype) -> Tensor:
    """(B, H/s, W/s, m, d) → (n·m·r·c, s², d), zeros off the map."""
    side, columns = grid.side, grid.columns
    x = x[step.images, step.first * side : (step.first + step.rows) * side].to(dtype)
    x = F.pad(x, (0, 0, 0, 0, 0, columns * side - x.shape[2], 0, step.rows * side - x.shape[1]))
    n, _, _, heads, d = x.shape
    return x.reshape(n, step.rows, side, columns, side, heads, d).permute(0, 5, 1, 3, 2, 4, 6).reshape(-1, side**2, d)


def _put_queries(out: Tensor, x: Tensor, step: _Step, grid: _Grid) -> None:
    """The inverse of `_queries`, into the places in `out`."""
    place = out[step.images, step.first * grid.side : (step.first + step.rows) * grid.side]
    n, height, width, heads, d = place.shape
    x = x.view(n, heads, step.rows, grid.columns, grid.side, grid.side, d).permute(0, 2, 4, 3, 5, 1, 6)
    place.copy_(x.reshape(n, step.rows * grid.side, grid.columns * grid.side, heads, d)[:, :height, :width])


def _windows(x: Tensor, step: _Step, grid: _Grid, dtype: torch.dtype) -> Tensor:
    """(B, H, W, m, d) → (n·m·r·c, w², d), zeros off the map."""
    (height, width), block, halo, window = grid.size, grid.block, grid.halo, grid.window
    top, bottom = step.first * block - halo, (step.first + step.rows) * block + halo
    x = x[step.images, max(top, 0) : min(bottom, height)].to(dtype)
    x = F.pad(x, (0, 0, 0, 0, halo, grid.columns * block + halo - width, max(-top, 0), max(bottom - height, 0)))
    return x.unfold(1, window, block).unfold(2, window, block).permute(0, 3, 1, 2, 5, 6, 4).reshape(-1, window**2, x.shape[-1])


def _add_windows(padded: Tensor, x: Tensor, step: _Step, grid: _Grid) -> None:
    """Adds (n·m·r·c, w², d) to the places of the windows in (n, H, W, m, d), the map with what blocks and halo add around it."""
    n, _, _, heads, d = padded.shape
    window, block, columns = grid.window, grid.block, grid.columns
    x = x.view(n, heads, step.rows, columns, window, window, d).permute(0, 2, 3, 1, 6, 4, 5)
    apart = -(-window // block)  # blocks so far from each other have windows that do not overlap
    for i in range(min(apart, step.rows)):
        for j in range(min(apart, columns)):
            top, bottom = (step.first + i) * block, (step.first + step.rows - 1) * block + window
            places = padded[:, top:bottom, j * block :].unfold(1, window, apart * block).unfold(2, window, apart * block)
            places += x[:, i::apart, j::apart]


def _skewed(logits: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Views of (n, s², 2·(w + s − 1)), logits of every offset, as those of every key's row and every key's column, (n, s, s, w)."""
    n, _, length = logits.shape
    side, window, half = grid.side, grid.window, logits.shape[-1] // 2
    line = side * length
    rows = logits.as_strided((n, side, side, window), (side * line, line - 1, length, 1), side - 1)
    columns = logits.as_strided((n, side, side, window), (side * line, line, length - 1, 1), half + side - 1)
    return rows, columns


def _scores(queries: Tensor, keys: Tensor, table: Tensor, scale: float, step: _Step, grid: _Grid) -> Tensor:
    """(n·m·r·c, s², w²), −∞ beyond the border."""
    logits = (queries.flatten(0, 1) @ table.t()).unflatten(0, queries.shape[:2])
    by_row, by_column = _skewed(logits, grid)
    (height, width), halo, window, blocks = grid.size, grid.halo, grid.window, (-1, step.rows, grid.columns)
    if step.first + step.rows == grid.rows:
        by_row.unflatten(0, blocks)[:, -1, ..., height + 2 * halo - (grid.rows - 1) * grid.block :] = -math.inf
    by_column.unflatten(0, blocks)[:, :, -1, ..., width + 2 * halo - (grid.columns - 1) * grid.block :] = -math.inf
    scores = (by_row[..., None] + by_column[..., None, :]).view(-1, grid.side**2, window**2)
    return scores.baddbmm_(queries, keys.transpose(1, 2), alpha=scale)


def halo_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> Tensor:
    """See `zoo.kernels.halo_attention`."""
    return halo_attention_forward(q, k, v, rel_h, rel_w, block, halo, scale)[0]


@torch.library.custom_op("zoo::halo_attention", mutates_args=())
def halo_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Any floating dtypes, float32 inside. Also the logarithm of the softmax's denominator, (B, H/s, W/s, heads, 1)."""
    grid, inner = _grid(k, rel_h, block, halo), torch.promote_types(q.dtype, torch.float32)
    out, logsumexp = q.new_empty(*q.shape[:4], v.shape[-1]), q.new_empty(*q.shape[:4], 1, dtype=inner)
    table = torch.cat((rel_h, rel_w)).to(inner)
    with torch.autocast(q.device.type, enabled=False):
        for _, steps in _steps(k, v, grid):
            for step in steps:
                queries, keys, values = _queries(q, step, grid, inner), *(_windows(x, step, grid, inner) for x in (k, v))
                scores = _scores(queries, keys, table, scale, step, grid)
                highest = scores.amax(-1, keepdim=True)
                exponentials = scores.sub_(highest).exp_()
                total = exponentials.sum(-1, keepdim=True)
                _put_queries(out, torch.bmm(exponentials, values).div_(total), step, grid)
                _put_queries(logsumexp, total.log_().add_(highest), step, grid)
    return out, logsumexp


@halo_attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:4], v.shape[-1]), q.new_empty(*q.shape[:4], 1, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("zoo::halo_attention_backward", mutates_args=())
def halo_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rel_h and rel_w."""
    grid, inner = _grid(k, rel_h, block, halo), logsumexp.dtype
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    table = torch.cat((rel_h, rel_w)).to(inner)
    grad_table = torch.zeros_like(table)
    padded = [count * block + 2 * halo for count in (grid.rows, grid.columns)]
    (height, width), side, window = grid.size, grid.side, grid.window
    with torch.autocast(q.device.type, enabled=False):
        for images, steps in _steps(k, v, grid):
            sums = [x.new_zeros(len(x[images]), *padded, *x.shape[3:], dtype=inner) for x in (k, v)]
            for step in steps:
                queries, above, before, denominators = (_queries(x, step, grid, inner) for x in (q, grad, out, logsumexp))
                keys, values = (_windows(x, step, grid, inner) for x in (k, v))
                attention = _scores(queries, keys, table, scale, step, grid).sub_(denominators).exp_()
                _add_windows(sums[1], torch.bmm(attention.transpose(1, 2), above), step, grid)
                share = (above * before).sum(-1, keepdim=True)
                grad_scores = torch.bmm(above, values.transpose(1, 2)).sub_(share).mul_(attention)
                _add_windows(sums[0], torch.bmm(grad_scores.transpose(1, 2), queries).mul_(scale), step, grid)

                grad_logits = queries.new_zeros(*queries.shape[:2], len(table))
                by_row, by_column = _skewed(grad_logits, grid)
                by_key = grad_scores.view(-1, side, side, window, window)
                by_row.copy_(by_key.sum(-1))
                by_column.copy_(by_key.sum(-2))
                grad_table.addmm_(grad_logits.flatten(0, 1).t(), queries.flatten(0, 1))
                grad_queries = (grad_logits.flatten(0, 1) @ table).view_as(queries)
                _put_queries(grad_q, grad_queries.baddbmm_(grad_scores, keys, alpha=scale), step, grid)
            for whole, x in zip((grad_k, grad_v), sums, strict=True):
                whole[images] = x[:, halo : halo + height, halo : halo + width]
    return grad_q, grad_k, grad_v, *(x.to(rel_h.dtype, copy=True) for x in grad_table.chunk(2))


@halo_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (q, k, v, rel_h, rel_w))


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block, ctx.halo, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, logsumexp = ctx.saved_tensors
    return *halo_attention_backward(grad, *tensors, ctx.block, ctx.halo, ctx.scale, out, logsumexp), None, None, None


halo_attention_forward.register_autograd(_backward, setup_context=_setup_context)
