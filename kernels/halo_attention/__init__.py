import torch
from torch import Tensor

from .._backends import choose, name_of, observed, public_operator, remembered
from .._checking import check_number, check_tensors, check_whole
from .._layout import span, too_large
from . import blocked, reference

MOST_CHANNELS = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}  # of a head, of which registers hold no more

__all__ = ["halo_attention"]


@public_operator
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every block of queries over the same block grown by a halo (HaloNet, arXiv 2103.12731, section 2.2).

        out_i = Σ_j softmax_j(scale · q_i·k_j + q_i·rel_h[y_j − y_i] + q_i·rel_w[x_j − x_i]) v_j,  per head

    The map is cut into blocks of b × b positions, from the top left. The window of a block is the block and h positions
    around it, w = b + 2h wide. The map lies in a border of h zeros, which are keys and values like others: their scores are
    those of the relative positions. Where blocks do not divide the map, windows reach beyond the border; nobody attends to that.

    Args:
        q: (B, ⌈H / stride⌉, ⌈W / stride⌉, heads, d): with a stride, b / stride queries of each row and column of a block.
        k: (B, H, W, heads, d); v: (B, H, W, heads, e). float32, float64, float16, bfloat16; the softmax is at least float32.
        rel_h, rel_w: (w + b / stride − 1, d), shared by the heads, not scaled. Row y_j − y_i + b / stride − 1, where y_i = 0 …
            b / stride − 1 counts the queries of the block and y_j = 0 … w − 1 the rows of its window.
        block_size: b, a multiple of `stride`.
        halo_size: h.
        scale: default d^-0.5.
        backend: "reference" (plain gather), "blocked" or "pytorch" (some blocks at a time), "triton"; default what suits the device,
            see `zoo.kernels`. The kernels take up to 128 channels a head, 64 in float32.

    Returns:
        (B, ⌈H / stride⌉, ⌈W / stride⌉, heads, e) in the dtype of q. Differentiable any number of times in q, k, v, rel_h and rel_w.

    By default keys and values are never copied for all windows at once, and the attention is not kept for the backward pass: memory
    beyond the arguments is O(B·H·W·heads·(d + e)). Exported graphs hold the plain gather instead, for any
    size in ONNX; `torch.export` itself guards against maps of a single block where it was shown more.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    seen = observed((q, k, v, rel_h, rel_w, block_size, halo_size, stride, scale, backend))
    chosen = _chosen(seen, q, k, v, rel_h, rel_w, block_size, halo_size, stride, scale, backend)
    arguments = q, k, v, rel_h, rel_w, block_size, halo_size, q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen == "triton":
        from . import triton
        return triton.call(seen, *arguments)[0]
    return {"reference": reference, "blocked": blocked}[chosen].halo_attention(*arguments)


@remembered
def _chosen(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block_size: int, halo_size: int, stride: int, scale: float | None,
    backend: str | None,
) -> str:
    _check(q, k, v, rel_h, rel_w, block_size, halo_size, stride, scale)
    return choose("halo_attention", backend, q, lambda: "blocked", unsupported={"triton": lambda: _unsupported(q, k, v, rel_h)})


def _unsupported(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> str | None:
    """What the kernels cannot do, as a clause."""
    widest = max(q.shape[4], v.shape[4])
    if widest > MOST_CHANNELS[q.dtype]:
        return f"the kernels take at most {MOST_CHANNELS[q.dtype]} channels a head in {name_of(q.dtype)}, not {widest}"
    kept = 2 * (table.shape[0] + 6)  # of every query, for the backward pass: at most 3 places beside either end of each axis
    return too_large(span(q), span(k), span(v), q.shape[1] * q.shape[2] * q.shape[3] * max(kept, v.shape[4]))


def _check(q, k, v, rel_h, rel_w, block_size, halo_size, stride, scale) -> None:
    maps = {name: (x, f"B, H, W, heads, {width}") for name, x, width in (("q", q, "d"), ("k", k, "d"), ("v", v, "e"))}
    check_tensors("halo_attention", ("rel_h", "rel_w"), **maps, rel_h=(rel_h, "offsets, d"), rel_w=(rel_w, "offsets, d"))
    check_number("halo_attention", "scale", scale)
    check_whole("halo_attention", "block_size", 1, block_size)
    check_whole("halo_attention", "halo_size", 0, halo_size)
    check_whole("halo_attention", "stride", 1, stride)
    if block_size % stride:
        raise ValueError(f"halo_attention: stride must divide block_size ({block_size}), got {stride}")
    (b, height, width, heads, d), rows = k.shape, block_size + 2 * halo_size + block_size // stride - 1
    queries = (b, (height + stride - 1) // stride, (width + stride - 1) // stride, heads, d)
    if tuple(q.shape) != queries:
        raise ValueError(f"halo_attention: q must be {queries} for k {tuple(k.shape)} and stride {stride}, got {tuple(q.shape)}")
    if v.shape[:4] != k.shape[:4]:
        raise ValueError(f"halo_attention: v must be {(*k.shape[:4], 'e')}, got {tuple(v.shape)}")
    for name, x in (("rel_h", rel_h), ("rel_w", rel_w)):
        if tuple(x.shape) != (rows, d):
            raise ValueError(f"halo_attention: {name} must be {(rows, d)}, got {tuple(x.shape)}")
