"""Halo attention by plain gather: the definition, and what exported graphs hold."""
import torch
from torch import Tensor


def halo_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> Tensor:
    """See `zoo.kernels.halo_attention`.

    Blocks are cut out and pasted by index: a graph traced at one size then holds at every size. In the equations, n is the
    image, r and c the block, i and j the row and column of a query in its block, y and x those of a key in its window.
    """
    weights = attention(q, k, rel_h, rel_w, block, halo, scale).to(v.dtype)
    out = torch.einsum("nrcmijyx,nrcyxme->nrcijme", weights, _windows(v, block, halo))
    return _paste(out, q.shape[1], q.shape[2])


def attention(q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> Tensor:
    """The attention of every query over its window, (n, r, c, m, i, j, y, x)."""
    (height, width), window = k.shape[1:3], block + 2 * halo
    rows, columns = (height + block - 1) // block, (width + block - 1) // block
    side = rel_h.shape[0] - window + 1  # queries of a block's row

    query_y, query_x = (_starts(count, side, q) + torch.arange(side, device=q.device) for count in (rows, columns))
    queries, keys = _gather(q, query_y, query_x), _windows(k, block, halo)
    key_y, key_x = (_window_places(length, block, halo, k) for length in (height, width))
    within_border = _outer(key_y < height + halo, key_x < width + halo)[:, :, None, None, None]

    offset = torch.arange(window, device=q.device) - torch.arange(side, device=q.device)[:, None] + side - 1
    scores = torch.einsum("nrcijmd,nrcyxmd->nrcmijyx", queries * scale, keys)
    scores = scores + torch.einsum("nrcijmd,iyd->nrcmijy", queries, rel_h[offset].to(q.dtype))[..., None]
    scores = scores + torch.einsum("nrcijmd,jxd->nrcmijx", queries, rel_w[offset].to(q.dtype))[..., None, :]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~within_border, torch.finfo(scores.dtype).min)
    return scores.flatten(-2).softmax(-1).unflatten(-1, (window, window))


def _windows(x: Tensor, block: int, halo: int) -> Tensor:
    """(n, H, W, m, d) → the windows of all blocks, (n, r, c, y, x, m, d), 0 outside the map."""
    height, width = x.shape[1:3]
    rows, columns = (_window_places(length, block, halo, x) for length in (height, width))
    on_map = _outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))[..., None, None]
    return _gather(x, rows, columns) * on_map


def _window_places(length: int, block: int, halo: int, x: Tensor) -> Tensor:
    """Along one side, where the positions of every block's window lie: (blocks, window)."""
    return _starts((length + block - 1) // block, block, x) + torch.arange(block + 2 * halo, device=x.device) - halo


def _starts(count: int, size: int, x: Tensor) -> Tensor:
    return torch.arange(count, device=x.device)[:, None] * size


def _outer(y: Tensor, x: Tensor) -> Tensor:
    """(rows, s) and (columns, t) → (rows, columns, s, t), y and x."""
    return y[:, None, :, None] & x[None, :, None, :]


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(n, H, W, m, d) at (r, s) and (c, t) → (n, r, c, s, t, m, d); what lies outside the map is its nearest position."""
    rows, columns = rows.clamp(0, x.shape[1] - 1), columns.clamp(0, x.shape[2] - 1)
    return x[:, rows[:, None, :, None], columns[None, :, None, :]]


def _paste(x: Tensor, height: int, width: int) -> Tensor:
    """(n, r, c, s, s, m, d) → (n, H, W, m, d), the blocks side by side."""
    size = x.shape[3]
    row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    i, j = row // size, column // size
    # No remainder: torch's ONNX exporter cannot translate one by a symbolic size.
    return x[:, i, j, row - i * size, column - j * size]
