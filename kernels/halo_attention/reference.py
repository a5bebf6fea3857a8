"""Halo attention by plain gather: the definition, and what exported graphs hold."""
import torch
from torch import Tensor


def halo_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> Tensor:
    """See `zoo.kernels.halo_attention`.

    Blocks are cut out and pasted by index: a graph traced at one size then holds at every size. In the equations, n is the
    image, r and c the block, i and j the row and column of a query in its block, y and x those of a key in its window.
    """
    (height, width), window = k.shape[1:3], block + 2 * halo
    rows, columns = (height + block - 1) // block, (width + block - 1) // block
    side = rel_h.shape[0] - window + 1  # queries of a block's row

    query_y, query_x = (_starts(count, side, q) + torch.arange(side, device=q.device) for count in (rows, columns))
    key_y, key_x = (_starts(count, block, q) + torch.arange(window, device=q.device) - halo for count in (rows, columns))
    queries = _gather(q, query_y, query_x)
    on_map = _outer((key_y >= 0) & (key_y < height), (key_x >= 0) & (key_x < width))[..., None, None]
    keys, values = (_gather(x, key_y, key_x) * on_map for x in (k, v))
    within_border = _outer(key_y < height + halo, key_x < width + halo)[:, :, None, None, None]

    offset = torch.arange(window, device=q.device) - torch.arange(side, device=q.device)[:, None] + side - 1
    scores = torch.einsum("nrcijmd,nrcyxmd->nrcmijyx", queries * scale, keys)
    scores = scores + torch.einsum("nrcijmd,iyd->nrcmijy", queries, rel_h[offset].to(q.dtype))[..., None]
    scores = scores + torch.einsum("nrcijmd,jxd->nrcmijx", queries, rel_w[offset].to(q.dtype))[..., None, :]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~within_border, torch.finfo(scores.dtype).min)
    attention = scores.flatten(-2).softmax(-1).unflatten(-1, (window, window)).to(v.dtype)
    out = torch.einsum("nrcmijyx,nrcyxme->nrcijme", attention, values)
    return _paste(out, q.shape[1], q.shape[2])


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
