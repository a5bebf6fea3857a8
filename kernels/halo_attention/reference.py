"""Halo attention by plain gather: the definition, and what exported graphs hold."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .._exporting import is_exporting


def halo_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> Tensor:
    """See `zoo.kernels.halo_attention`.

    Blocks are cut out by index: a graph traced at one size then holds at every size. In the equations, n is the
    image, r and c the block, i and j the row and column of a query in its block, y and x those of a key in its window.
    """
    weights = attention(q, k, rel_h, rel_w, block, halo, scale).to(v.dtype)
    values = _gather(v, *weights.shape[1:3], size=block, halo=halo)
    out = torch.einsum("nrcmijyx,nrycxme->nricjme", weights, values)  # the blocks side by side
    n, rows, side, columns, *_ = out.shape
    out = out.reshape(n, rows * side, columns * side, *v.shape[3:])
    # In exported graphs views would make guards of how they lie; copies have no derivative in torch 2.11.
    first = torch.narrow_copy if is_exporting() else torch.narrow
    return first(first(out, 1, 0, q.shape[1]), 2, 0, q.shape[2])


def attention(q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, scale: float) -> Tensor:
    """The attention of every query over its window, (n, r, c, m, i, j, y, x)."""
    (height, width), window = k.shape[1:3], block + 2 * halo
    rows, columns = (height + block - 1) // block, (width + block - 1) // block
    side = rel_h.shape[0] - window + 1  # queries of a block's row

    queries, keys = _gather(q, rows, columns, side, 0), _gather(k, rows, columns, block, halo)
    key_y, key_x = (_places(count, block, window, k) < length + 2 * halo for count, length in ((rows, height), (columns, width)))
    within_border = (key_y[:, None, :, None] & key_x[:, None])[:, :, None, None, None]

    offset = torch.arange(window, device=q.device) - torch.arange(side, device=q.device)[:, None] + side - 1
    scores = torch.einsum("nricjmd,nrycxmd->nrcmijyx", queries * scale, keys)
    scores = scores + torch.einsum("nricjmd,iyd->nrcmijy", queries, rel_h[offset].to(q.dtype))[..., None]
    scores = scores + torch.einsum("nricjmd,jxd->nrcmijx", queries, rel_w[offset].to(q.dtype))[..., None, :]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = torch.where(within_border, scores, torch.finfo(scores.dtype).min)
    return scores.flatten(-2).softmax(-1).unflatten(-1, (window, window))


def _gather(x: Tensor, rows: int, columns: int, size: int, halo: int) -> Tensor:
    """(n, H, W, m, d) → blocks of size × size positions with a halo, (n, rows, y, columns, x, m, d), 0 outside the map."""
    after = halo + size - 1  # what the last block may lack at most: a graph need not ask
    x = F.pad(x, (0, 0, 0, 0, halo, after, halo, after))
    window = size + 2 * halo
    x = x.index_select(1, _places(rows, size, window, x).flatten()).index_select(2, _places(columns, size, window, x).flatten())
    return x.reshape(x.shape[0], rows, window, columns, window, *x.shape[3:])


def _places(count: int, size: int, window: int, x: Tensor) -> Tensor:
    """Along one side, which of the padded map's positions every block's window has: (blocks, window)."""
    return torch.arange(count, device=x.device)[:, None] * size + torch.arange(window, device=x.device)


def flops(q: tuple, k: tuple, v: tuple, rel_h: tuple, rel_w: tuple, block: int, halo: int, *_: object) -> int:
    """Of the products, from shapes in the place of tensors: whole blocks and windows count, what lies off the map too."""
    (b, height, width, heads, d), window = k, block + 2 * halo
    side = rel_h[0] - window + 1
    queries = b * ((height + block - 1) // block) * ((width + block - 1) // block) * heads * side**2
    return 2 * queries * (window**2 * (d + v[4]) + 2 * window * d)
