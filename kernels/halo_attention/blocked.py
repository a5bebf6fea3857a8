"""Halo attention some blocks at a time, as an operator with its own gradient.

Windows are cut where they leave the map: nothing is copied or multiplied for the border, whose keys are zeros. Their scores are
those of the relative positions, r_y + c_x, so that the exponentials of a whole rectangle of the border add up to Σ exp(r_y) · Σ exp(c_x).
Windows and scores are held for one step only. The backward pass makes them again, from the logarithm of the softmax's
denominator, and adds the gradients of windows up where they overlap.
"""
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import register_gradient
from . import reference

AT_ONCE = {"cpu": 1 << 20}  # elements of scores, keys and values: 4 MiB of float32, of which the caches hold most
AT_ONCE_ELSEWHERE = 1 << 26


class _Run(NamedTuple):
    """Neighbouring blocks, along one side of the map, whose windows the map cuts alike.

    Of the positions of a window, `before` lie in the border before the map, `inside` on it and `after` in the border behind it.
    """

    first: int
    count: int
    before: int
    inside: int
    after: int

    @property
    def on_map(self) -> slice:
        return slice(self.before, self.before + self.inside)

    @property
    def border(self) -> list[int]:
        end = self.before + self.inside
        return [*range(self.before), *range(end, end + self.after)]


class _Room:
    """Memory for what one step holds and the next holds in its place.

    Large pieces that are given back and taken again come from the system page by page, which costs more than to fill them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._pieces, self._lines = {}, {}
        self._dd: dict[str, Any] = dict(device=device, dtype=dtype)

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._pieces or len(self._pieces[name]) < size:
            self._pieces[name] = torch.empty(size, **self._dd)
        return self._pieces[name][:size].view(shape)

    def lines(self, rows: int, columns: int) -> Tensor:
        """(y + x, y·x), one where the key lies in the row or in the column: a product with it is faster than sums over short lines."""
        if (rows, columns) not in self._lines:
            down, across = (torch.eye(n, **self._dd) for n in (rows, columns))
            self._lines[rows, columns] = torch.cat((down.repeat_interleave(columns, 1), across.repeat(1, rows)))
        return self._lines[rows, columns]

    def like(self, name: str, x: Tensor, width: int) -> Tensor:
        """For x (n, i, d) one (n, i, width), with channels inside or outside in memory as they are there."""
        n, i, _ = x.shape
        return self(name, n, i, width) if x.stride(-1) == 1 else self(name, n, width, i).transpose(1, 2)

    def flat(self, name: str, x: Tensor) -> Tensor:
        """(n, m, r, c, y, x, d) → (n·m·r·c, y·x, d), channels inside or outside in memory as they were: copies that turn are slow."""
        inside = x.stride(-1) == 1
        x = x if inside else x.movedim(-1, 4)
        n, m, r, c, *rest = x.shape
        shape = n * m * r * c, *((rest[0] * rest[1], rest[2]) if inside else (rest[0], rest[1] * rest[2]))
        try:
            x = x.view(shape).to(self._dd["dtype"])
        except RuntimeError:  # the blocks do not lie behind each other, as they do where a map is one block
            x = self(name, *x.shape).copy_(x).view(shape)
        return x if inside else x.transpose(1, 2)


class _Step(NamedTuple):
    """Some images, and some blocks of each; b × b positions and s × s queries a block, h around it."""

    images: slice
    rows: _Run
    columns: _Run
    block: int
    halo: int
    side: int


def _runs(length: int, block: int, halo: int) -> list[_Run]:
    cuts = []
    for start in range(-halo, length - halo, block):
        stop = min(start + block + 2 * halo, length + halo)
        end = min(stop, length)
        cuts.append((max(-start, 0), end - max(start, 0), stop - end))
    runs, first = [], 0
    for cut, blocks in itertools.groupby(cuts):
        runs.append(_Run(first, len(list(blocks)), *cut))
        first += runs[-1].count
    return runs


def _steps(k: Tensor, v: Tensor, rel_h: Tensor, block: int, halo: int) -> Iterator[_Step]:
    side, at_once = rel_h.shape[0] - block - 2 * halo + 1, AT_ONCE.get(k.device.type, AT_ONCE_ELSEWHERE)
    for rows, columns in itertools.product(*(_runs(length, block, halo) for length in k.shape[1:3])):
        per_row = k.shape[3] * columns.count * rows.inside * columns.inside * (side**2 + k.shape[4] + v.shape[4])
        count = max(1, at_once // per_row)
        images = max(1, count // rows.count)
        for start in range(0, k.shape[0], images):
            for row in range(0, rows.count, count):
                some = rows._replace(first=rows.first + row, count=min(count, rows.count - row))
                yield _Step(slice(start, start + images), some, columns, block, halo, side)


def _multiply(out: Tensor, a: Tensor, b: Tensor, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """out ← beta · out + alpha · a b, of batches of matrices, where out or its transpose is contiguous."""
    if out.is_contiguous():
        return out.baddbmm_(a, b, beta=beta, alpha=alpha)
    out.transpose(1, 2).baddbmm_(b.transpose(1, 2), a.transpose(1, 2), beta=beta, alpha=alpha)
    return out


def _of_blocks(run: _Run, side: int) -> slice:
    return slice(run.first * side, (run.first + run.count) * side)


def _queries(name: str, x: Tensor, step: _Step, room: _Room) -> Tensor:
    """(B, H/s, W/s, m, d) → (n·m·r·c, s², d), zeros off the map."""
    rows, columns, side = step.rows, step.columns, step.side
    x = x[step.images, _of_blocks(rows, side), _of_blocks(columns, side)]
    missing = rows.count * side - x.shape[1], columns.count * side - x.shape[2]
    if any(missing):
        x = F.pad(x, (0, 0, 0, 0, 0, missing[1], 0, missing[0]))
    return room.flat(name, x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(0, 5, 1, 3, 2, 4, 6))


def _put_queries(out: Tensor, x: Tensor, step: _Step) -> None:
    """The inverse of `_queries`, into the places in `out`."""
    rows, columns, side = step.rows, step.columns, step.side
    place = out[step.images, _of_blocks(rows, side), _of_blocks(columns, side)]
    n, height, width, heads, d = place.shape
    x = x.view(n, heads, rows.count, columns.count, side, side, d).permute(0, 2, 4, 3, 5, 1, 6)
    if (height, width) == (rows.count * side, columns.count * side):
        place.unflatten(2, (-1, side)).unflatten(1, (-1, side)).copy_(x)
    else:
        place.copy_(x.flatten(3, 4).flatten(1, 2)[:, :height, :width])


def _places(x: Tensor, step: _Step) -> Tensor:
    """The part of (B, H, W, m, d) that the windows of the step lie on."""
    def along(run: _Run) -> slice:
        start = run.first * step.block - step.halo + run.before
        return slice(start, start + (run.count - 1) * step.block + run.inside)
    return x[step.images, along(step.rows), along(step.columns)]


def _windows(name: str, x: Tensor, step: _Step, room: _Room) -> Tensor:
    """(B, H, W, m, d) → (n·m·r·c, y·x, d), the positions of every window that are on the map."""
    x = _places(x, step).unfold(1, step.rows.inside, step.block).unfold(2, step.columns.inside, step.block)
    return room.flat(name, x.permute(0, 3, 1, 2, 5, 6, 4))


def _add_windows(whole: Tensor, x: Tensor, step: _Step) -> None:
    """Adds (n·m·r·c, y·x, d) to the places of the windows in (B, H, W, m, d)."""
    places, (rows, columns), block = _places(whole, step), (step.rows, step.columns), step.block
    n, _, _, heads, d = places.shape
    x = x.view(n, heads, rows.count, columns.count, rows.inside, columns.inside, d).permute(0, 2, 3, 1, 6, 4, 5)
    down, across = (-(-run.inside // block) for run in (rows, columns))  # blocks so far apart have windows that do not overlap
    for i in range(min(down, rows.count)):
        for j in range(min(across, columns.count)):
            apart = places[:, i * block :, j * block :].unfold(1, rows.inside, down * block).unfold(2, columns.inside, across * block)
            apart += x[:, i::down, j::across]


def _skewed(logits: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    """Views of (n, s², 2·(w + s − 1)), logits of every offset, as those of the row and of the column of every key, (n, s, s, ≤ w).

    Of the window's w, those up to where the border of the map ends.
    """
    n, _, length = logits.shape
    side, half = step.side, length // 2
    line = side * length
    down, across = (run.before + run.inside + run.after for run in (step.rows, step.columns))
    rows = logits.as_strided((n, side, side, down), (side * line, line - 1, length, 1), side - 1)
    columns = logits.as_strided((n, side, side, across), (side * line, line, length - 1, 1), half + side - 1)
    return rows, columns


class _Border(NamedTuple):
    """Logarithms of sums of exponentials, (n, s, s, 1)."""

    row: Tensor  # of the row's logits where the row is in the border
    column: Tensor
    rows: Tensor  # of those of all rows
    columns: Tensor
    scores: Tensor  # of the scores of the keys in the border


def _border(by_row: Tensor, by_column: Tensor, step: _Step) -> _Border | None:
    """None where the windows of the step lie on the map."""
    if not step.rows.border and not step.columns.border:
        return None
    row, column = (x[..., run.border].logsumexp(-1, keepdim=True) for x, run in ((by_row, step.rows), (by_column, step.columns)))
    on_map = by_row[..., step.rows.on_map].logsumexp(-1, keepdim=True)
    rows, columns = torch.logaddexp(row, on_map), by_column.logsumexp(-1, keepdim=True)
    return _Border(row, column, rows, columns, torch.logaddexp(row + columns, on_map + column))


def _scores(
    queries: Tensor, keys: Tensor, table: Tensor, scale: float, step: _Step, room: _Room
) -> tuple[Tensor, Tensor, Tensor]:
    """(n·m·r·c, s², y·x) of the keys on the map, and the logits of rows and columns, (n·m·r·c, s, s, ≤ w)."""
    logits = (queries.flatten(0, 1) @ table.t()).unflatten(0, queries.shape[:2])
    by_row, by_column = _skewed(logits, step)
    on_map = torch.cat((by_row[..., step.rows.on_map], by_column[..., step.columns.on_map]), -1)
    scores = room("scores", *queries.shape[:2], keys.shape[1])
    torch.mm(on_map.flatten(0, 2), room.lines(step.rows.inside, step.columns.inside), out=scores.flatten(0, 1))
    return scores.baddbmm_(queries, keys.transpose(1, 2), alpha=scale), by_row, by_column


def halo_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> Tensor:
    """See `zoo.kernels.halo_attention`."""
    return halo_attention_forward(q, k, v, rel_h, rel_w, block, halo, scale)[0]


def _empty(like: Tensor, width: int) -> Tensor:
    """(B, H, W, m, width), channels inside or outside in memory."""
    b, height, size, heads, _ = like.shape
    if like.stride(-1) == 1:
        return like.new_empty(b, height, size, heads, width)
    return like.new_empty(b, heads, width, height, size).permute(0, 3, 4, 1, 2)


def _empty_out(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q, v.shape[4]), q.new_empty(*q.shape[:4], 1, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("zoo::halo_attention", mutates_args=())
def halo_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Any floating dtypes, float32 inside. Also the logarithm of the softmax's denominator, (B, H/s, W/s, heads, 1)."""
    inner = torch.promote_types(q.dtype, torch.float32)
    room = _Room(q.device, inner)
    out, logsumexp = _empty_out(q, v)
    table = torch.cat((rel_h, rel_w)).to(inner)
    with torch.autocast(q.device.type, enabled=False):
        for step in _steps(k, v, rel_h, block, halo):
            queries, keys, values = _queries("q", q, step, room), _windows("k", k, step, room), _windows("v", v, step, room)
            scores, by_row, by_column = _scores(queries, keys, table, scale, step, room)
            highest, border = scores.amax(-1, keepdim=True), _border(by_row, by_column, step)
            if border is not None:
                in_border = border.scores.view_as(highest)
                highest = torch.maximum(highest, in_border)
            exponentials = scores.sub_(highest).exp_()
            total = exponentials.sum(-1, keepdim=True)
            if border is not None:
                total += in_border.sub_(highest).exp_()
            _put_queries(out, _multiply(room.like("out", queries, v.shape[4]), exponentials, values).div_(total), step)
            _put_queries(logsumexp, total.log_().add_(highest), step)
    return out, logsumexp


@halo_attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_out(q, v)


@torch.library.custom_op("zoo::halo_attention_backward", mutates_args=())
def halo_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rel_h and rel_w."""
    inner = logsumexp.dtype
    room = _Room(q.device, inner)
    grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.zeros_like(_empty(x, x.shape[4]), dtype=inner) for x in (k, v))
    table = torch.cat((rel_h, rel_w)).to(inner)
    grad_table = torch.zeros_like(table)
    with torch.autocast(q.device.type, enabled=False):
        for step in _steps(k, v, rel_h, block, halo):
            queries, above, before = (_queries(name, x, step, room) for name, x in (("q", q), ("above", grad), ("out", out)))
            denominators = _queries("logsumexp", logsumexp, step, room)
            keys, values = _windows("k", k, step, room), _windows("v", v, step, room)
            scores, by_row, by_column = _scores(queries, keys, table, scale, step, room)
            attention = scores.sub_(denominators).exp_()
            _add_windows(grad_v, _multiply(room.like("grad", values, v.shape[4]), attention.transpose(1, 2), above), step)
            share = (above * before).sum(-1, keepdim=True)
            grad_scores = torch.bmm(above, values.transpose(1, 2), out=room("grad_scores", *attention.shape)).sub_(share).mul_(attention)
            grad_keys = _multiply(room.like("grad", keys, k.shape[4]), grad_scores.transpose(1, 2), queries, alpha=scale)
            _add_windows(grad_k, grad_keys, step)

            grad_logits = queries.new_zeros(*queries.shape[:2], len(table))
            grad_rows, grad_columns = _skewed(grad_logits, step)
            if border := _border(by_row, by_column, step):
                shape = share.shape[:1] + border.row.shape[1:]
                for whole, x, run, inside, outside in (
                        (grad_rows, by_row, step.rows, border.column, border.columns),
                        (grad_columns, by_column, step.columns, border.row, border.rows)):
                    others = outside.repeat(1, 1, 1, x.shape[-1])  # the sum over the keys of a row or a column in the border
                    others[..., run.on_map] = inside
                    whole.copy_(others.add_(x).sub_(denominators.view(shape)).exp_().mul_(share.view(shape)).neg_())
            lines = room.lines(step.rows.inside, step.columns.inside)
            on_map = (grad_scores.flatten(0, 1) @ lines.t()).view(*by_row.shape[:3], -1)
            grad_rows[..., step.rows.on_map] += on_map[..., : step.rows.inside]
            grad_columns[..., step.columns.on_map] += on_map[..., step.rows.inside :]
            grad_table.addmm_(grad_logits.flatten(0, 1).t(), queries.flatten(0, 1))
            grad_queries = _multiply(room.like("grad_q", queries, k.shape[4]), grad_logits, table.expand(len(queries), -1, -1))
            _put_queries(grad_q, _multiply(grad_queries, grad_scores, keys, beta=1.0, alpha=scale), step)
    grad_rel_h, grad_rel_w = (x.to(rel_h.dtype, copy=True) for x in grad_table.chunk(2))
    return grad_q, grad_k.to(k.dtype), grad_v.to(k.dtype), grad_rel_h, grad_rel_w


@halo_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), _empty(k, k.shape[4]), _empty(v, v.shape[4]), torch.empty_like(rel_h), torch.empty_like(rel_w)


register_gradient(halo_attention_forward, halo_attention_backward, reference.halo_attention, reference.flops, kept=(0, 1))
