import torch
from torch import Tensor

from .._backends import choose, observed, public_operator, remembered
from .._checking import check_number, check_tensors
from .._layout import span, too_large
from . import blocked, reference
from ._pyramid import check_block_size, check_levels, pyramid

__all__ = ["pyramid_sparse_attention"]

WIDEST_HEAD, MOST_TOKENS = 128, 1 << 24  # that the Triton kernels take


@public_operator
def pyramid_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    block_size: tuple[int, int] = (128, 128),
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of blocks of queries to blocks of keys that are read whole, averaged, or not at all (arXiv 2512.04025).

        out_i = Σ_g softmax_g(scale · q_i·k̄_g + ln n_g) v̄_g

    A pair of blocks has a level ℓ: 0 leaves the keys out; 1, 2, 4 and 8 take the means k̄_g, v̄_g of ℓ consecutive keys and values
    each, n_g = ℓ. The softmax is over everything that the query keeps. Of the last block only the tokens that there are count, n_g is
    the number of those in the group; the authors' code repeats the last one (ziplab/Pyramid-Sparse-Attention,
    src/psa_triton/kernels/psa_kernel_legacy.py). Queries without any key get 0.

    Args:
        q: (B, heads, N, d); k: (B, heads, M, d); v: (B, heads, M, e). float32, float64, float16, bfloat16; the softmax is at least
            float32.
        levels: (B, heads, ⌈N / queries⌉, ⌈M / keys⌉) of any integer dtype, see `zoo.layers.pyramid_levels`. The CPU raises where one is
            none of 0, 1, 2, 4, 8. GPUs do not ask, and the block is left out.
        block_size: queries and keys of a block; the latter a multiple of 8.
        scale: default d^-0.5.
        backend: "reference" (scores of all levels, masked), "blocked" or "pytorch" (one block of queries at a time, over what it keeps),
            "triton"; default what suits the device, see `zoo.kernels`. The kernels take heads of at most 128 channels; blocks of fewer than
            64 queries leave parts of their tiles idle.

    Returns:
        (B, heads, N, e) in the dtype of q. Differentiable any number of times in q, k and v.

    Means of keys and values take 15/8 of their own memory; attention is not kept for the backward pass. NaN and infinity reach
    nothing that leaves them out, but for the reference, which exported graphs hold. Results and gradients are deterministic. FLOP counters
    are told of all levels of all blocks, as they see shapes only.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    seen = observed((q, k, v, levels, block_size, scale, backend))
    chosen = _chosen(seen, q, k, v, levels, block_size, scale, backend)
    if not seen and chosen != "blocked":
        check_levels(levels)
    keys, values = (pyramid(x, levels.shape[3], block_size[1]) for x in (k, v))
    arguments = q, keys, values, levels, k.shape[2], *block_size, q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen == "triton":
        from . import triton
        return triton.call(seen, *arguments)[0]
    return {"reference": reference, "blocked": blocked}[chosen].pyramid_sparse_attention(*arguments)


@remembered
def _chosen(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block_size: tuple[int, int], scale: float | None, backend: str | None
) -> str:
    check_tensors("pyramid_sparse_attention", q=(q, "B, heads, N, d"), k=(k, "B, heads, M, d"), v=(v, "B, heads, M, e"))
    check_block_size("pyramid_sparse_attention", block_size)
    check_number("pyramid_sparse_attention", "scale", scale)
    (b, heads, queries, d), tokens = q.shape, k.shape[2]
    if (*k.shape[:2], k.shape[3]) != (b, heads, d):
        raise ValueError(f"pyramid_sparse_attention: k must have q's batch, heads and channels, ({b}, {heads}, M, {d}), got "
                         f"{tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"pyramid_sparse_attention: v must be {(*k.shape[:3], 'e')}, got {tuple(v.shape)}")
    if not isinstance(levels, Tensor) or levels.dtype == torch.bool or levels.is_floating_point() or levels.is_complex():
        raise TypeError("pyramid_sparse_attention: levels must be a tensor of whole numbers, got "
                        f"{getattr(levels, 'dtype', type(levels).__name__)}")
    if levels.device != q.device:
        raise ValueError(f"pyramid_sparse_attention: levels must be on the device of q ({q.device}), got {levels.device}")
    shape = (b, heads, (queries + block_size[0] - 1) // block_size[0], (tokens + block_size[1] - 1) // block_size[1])
    if tuple(levels.shape) != shape:
        raise ValueError(f"pyramid_sparse_attention: levels must be {shape}, one for each pair of blocks, got {tuple(levels.shape)}")
    return choose("pyramid_sparse_attention", backend, q, lambda: "blocked",
                  unsupported={"triton": lambda: _unsupported(q, k, v, block_size[1])})


def _unsupported(q: Tensor, k: Tensor, v: Tensor, key_block: int) -> str | None:
    """What the kernels cannot do, as a clause."""
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST_HEAD:
        return f"the kernels take heads of at most {WIDEST_HEAD} channels, not {widest}"
    if (most := max(q.shape[2], k.shape[2])) > MOST_TOKENS:
        return f"the kernels take at most {MOST_TOKENS} tokens, not {most}"
    heads, tokens = k.shape[1], k.shape[2] + key_block
    return too_large(span(q), 2 * heads * tokens * widest, heads * q.shape[2] * widest)
