"""Pyramid sparse attention of long rows of tokens, without training (arXiv 2512.04025)."""
import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from zoo.kernels import pyramid_sparse_attention
from zoo.kernels._checking import check_number, check_tensors, check_whole
from zoo.kernels._exporting import is_exporting
from zoo.kernels.pyramid_sparse_attention import reference
from zoo.kernels.pyramid_sparse_attention._pyramid import LEVELS, check_block_size, counts, pyramid

from ._capture import report
from ._tracing import notrace_module

SHARES = {"topk": (0.05, 0.15, 0.25, 0.5), "thresholdbound": (0.4, 0.5, 0.6, 0.8)}  # the authors', by mode
SAMPLED = 4  # of so many tokens of a block one is looked at
SCORES_AT_ONCE = 1 << 22  # of sampled queries and keys


def gilbert_order(height: int, width: int) -> Tensor:
    """The positions of a map in the order of a space-filling curve, in which what lies together on the map comes together: (H·W,) int64.

    A Hilbert curve of any height and width: the rectangle is cut into parts that are filled one after the other, each step leads to a
    neighbour. Where a side is odd, one step may be diagonal. `x.flatten(-2)[..., gilbert_order(H, W)]` puts a map (…, H, W) into order.
    """
    if min(height, width) < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    return torch.tensor(_gilbert(height, width))


@functools.lru_cache(64)
def _gilbert(height: int, width: int) -> tuple[int, ...]:
    # Complex numbers as positions: the real part is the column, the imaginary part the row.
    curve = _curve(0j, 1, width, 1j, height) if width >= height else _curve(0j, 1j, height, 1, width)
    return tuple(int(at.imag) * width + int(at.real) for at in curve)


def _curve(corner: complex, along: complex, length: int, across: complex, breadth: int) -> Iterator[complex]:
    """Fills a rectangle from a corner to the end of the side that lies along; `along` and `across` are steps of 1."""
    if breadth == 1 or length == 1:
        yield from (corner + i * along + j * across for j in range(breadth) for i in range(length))
        return
    half = length // 2
    if 2 * length > 3 * breadth:  # too long: two parts one after the other
        half += half % 2 if length > 2 else 0  # an even number of steps, so that none is diagonal
        yield from _curve(corner, along, half, across, breadth)
        yield from _curve(corner + half * along, along, length - half, across, breadth)
        return
    up = breadth // 2
    up += up % 2 if breadth > 2 else 0
    yield from _curve(corner, across, up, along, half)  # up, on over all the length, and down again
    yield from _curve(corner + up * across, along, length, across, breadth - up)
    yield from _curve(corner + (length - 1) * along + (up - 1) * across, -across, up, -along, length - half)


def pyramid_levels(
    q: Tensor,
    k: Tensor,
    block_size: tuple[int, int] = (128, 128),
    mode: str = "topk",
    shares: Sequence[float] | None = None,
    scale: float | None = None,
    prefix_tokens: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How coarsely each block of queries should read each block of keys: `levels` for `zoo.kernels.pyramid_sparse_attention`.

    Of every block a quarter of the tokens is looked at, the same places in all blocks, drawn anew in each call. A pair of blocks counts as
    much as the largest weight in the softmax of its sampled queries over all sampled keys. In the order of that, every block of queries
    reads the first blocks of keys at level 1, the next at 2, 4 and 8, and leaves out the rest.

    Args:
        q: (B, heads, N, d); k: (B, heads, M, d), in an order in which near tokens belong together, such as `gilbert_order`'s.
        block_size: queries and keys of a block.
        mode: "topk": `shares` are of the number of blocks of keys, rounded up; "thresholdbound": of the sum of what they count.
        shares: where each of the levels 1, 2, 4 and 8 ends; default the authors' (0.05, 0.15, 0.25, 0.5) for "topk", (0.4, 0.5, 0.6, 0.8)
            for "thresholdbound".
        scale: of the logits; default d^-0.5.
        prefix_tokens: the blocks that hold the first so many tokens, class tokens and registers, are read at level 1 by all, and read all
            at level 1.
        generator: of torch, on the CPU, which draws the places; the same one, the same levels.

    Returns:
        (B, heads, ⌈N / queries⌉, ⌈M / keys⌉) int32, without gradients. Memory is that of a part of the sampled scores at a time.

    Raises:
        ValueError, TypeError: arguments that do not fit together, an unknown mode, shares that do not rise from 0 to 1.
    """
    check_tensors("pyramid_levels", q=(q, "B, heads, N, d"), k=(k, "B, heads, M, d"))
    if (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"pyramid_levels: k must have q's batch, heads and channels, got {tuple(k.shape)} for q {tuple(q.shape)}")
    check_block_size("pyramid_levels", block_size)
    check_whole("pyramid_levels", "prefix_tokens", 0, prefix_tokens)
    check_number("pyramid_levels", "scale", scale)
    of_queries, of_keys = (_places(size, generator).to(q.device) for size in block_size)
    return _levels(q, k, of_queries, of_keys, block_size, mode, _shares(mode, shares), scale, prefix_tokens)


def _shares(mode: str, shares: Sequence[float] | None) -> tuple[float, ...]:
    if mode not in SHARES:
        raise ValueError(f"mode must be one of {', '.join(SHARES)}, got {mode!r}")
    chosen = SHARES[mode] if shares is None else tuple(shares)
    if len(chosen) != len(LEVELS) or list(chosen) != sorted(chosen) or not 0 <= chosen[0] <= chosen[-1] <= 1:
        raise ValueError(f"shares must be four numbers that rise from 0 to 1, where the levels 1, 2, 4 and 8 end, got {chosen}")
    return chosen


def _places(size: int, generator: torch.Generator | None) -> Tensor:
    """A random quarter of the places in a block."""
    return torch.randperm(size, generator=generator, device="cpu")[: math.ceil(size / SAMPLED)].sort().values


@torch.no_grad()
def _levels(
    q: Tensor, k: Tensor, of_queries: Tensor, of_keys: Tensor, block_size: tuple[int, int], mode: str, shares: tuple[float, ...],
    scale: float | None, prefix_tokens: int,
) -> Tensor:
    energy = _energy(q, k, of_queries, of_keys, block_size, q.shape[-1] ** -0.5 if scale is None else scale)
    ranked, order = energy.topk(energy.shape[-1])  # sorted; exporters know no stable sort
    if mode == "topk":
        before = torch.arange(energy.shape[-1], device=q.device).expand_as(energy)
        ends = [math.ceil(share * energy.shape[-1] - 1e-9) for share in shares]  # 0.15 · 20 is 3.0000000000000004
    else:
        before, ends = (ranked.cumsum(-1) - ranked) / ranked.sum(-1, keepdim=True), shares
    of_ranks = torch.zeros_like(order, dtype=torch.int32)
    for level, end in reversed(list(zip(LEVELS, ends, strict=True))):
        of_ranks = torch.where(before < end, level, of_ranks)
    levels = torch.zeros_like(of_ranks).scatter(-1, order, of_ranks)
    if prefix_tokens:
        held = [torch.arange(count, device=q.device) * size < prefix_tokens
                for count, size in zip(levels.shape[2:], block_size, strict=True)]
        levels = torch.where(held[0][:, None] | held[1], 1, levels)
    return levels


def _energy(q: Tensor, k: Tensor, of_queries: Tensor, of_keys: Tensor, block_size: tuple[int, int], scale: float) -> Tensor:
    """Of every pair of blocks the largest weight between sampled tokens, (B, heads, query blocks, key blocks)."""
    queries, keys = (_sampled(x, places, size) for x, places, size in zip((q, k), (of_queries, of_keys), block_size, strict=True))
    key_blocks, keys = keys.shape[2], keys.flatten(2, 3).transpose(-2, -1)
    at_once = queries.shape[2]
    if not is_exporting():
        at_once = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * queries.shape[3] * keys.shape[3]))
    energy = []
    for some in queries.split(at_once, 2):
        weights = ((some.flatten(2, 3) * scale) @ keys).softmax(-1, dtype=torch.float32)
        energy.append(weights.unflatten(-1, (key_blocks, -1)).amax(-1).unflatten(2, (some.shape[2], -1)).amax(3))
    return torch.cat(energy, 2)


def _sampled(x: Tensor, places: Tensor, size: int) -> Tensor:
    """(B, heads, N, d) → (B, heads, blocks, sampled, d); in the last block the last token stands for those beyond."""
    starts = torch.arange(0, x.shape[2], size, device=x.device)
    index = (starts[:, None] + places).clamp(max=x.shape[2] - 1)
    return x.index_select(2, index.flatten()).unflatten(2, index.shape)


@notrace_module
class PyramidSparseAttention(nn.Module):
    """Softmax attention of long rows, of which every block of queries reads what counts whole, less in averages, and the rest not at all.

    (B, heads, N, d) three times → (B, heads, N, d). In the place of softmax by `zoo.replace_attention(vit, "pyramid_sparse",
    grid=(64, 64))`, without training, for rows of 4,000 tokens and more; outputs are near those of softmax attention, how near depends
    on the network and the shares. Rows that fit into one block of keys are read whole: that is softmax attention. `zoo.capture` gets the
    `levels` (B, heads, query blocks, key blocks), in the order of the curve, and the `attention` (B, heads, N, N) that averages
    amount to.

    Args:
        num_heads, head_dim: of queries, keys and values.
        grid: rows and columns of the map that the tokens are, row by row, after the prefix tokens. They are put into the order of
            `gilbert_order`, and back. Default: blocks are of tokens as they come.
        prefix_tokens: class tokens and registers before the map; their blocks are read at level 1 by all, and read all at level 1.
        block_size: queries and keys of a block.
        mode, shares: as in `pyramid_levels`.
        seed: of the places that are sampled in every block, which are drawn here, once, so that the same input gives the same output.
        device, dtype: of the tokens; there are no parameters.

    Differences from the authors' code (ziplab/Pyramid-Sparse-Attention, src/psa_triton/pyramid_sparse_attention.py): what lies beyond the
    last token does not count, and places are drawn once.

    Raises:
        ValueError: at construction, an unknown mode, shares that do not rise, a grid or prefix_tokens that are none; in
            `forward`, a number of tokens that is not the grid's, masks and biases of logits, and dropout.
    """

    takes_bias = False
    heads_are_independent = True

    order: Tensor
    back: Tensor
    query_places: Tensor
    key_places: Tensor

    def __init__(
        self, num_heads: int, head_dim: int, grid: tuple[int, int] | None = None, prefix_tokens: int = 1,
        block_size: tuple[int, int] = (128, 128), mode: str = "topk", shares: Sequence[float] | None = None, seed: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_block_size("PyramidSparseAttention", block_size)
        check_whole("PyramidSparseAttention", "prefix_tokens", 0, prefix_tokens)
        self.grid, self.prefix_tokens, self.block_size, self.mode, self.seed = grid, prefix_tokens, block_size, mode, seed
        self.shares = _shares(mode, shares)
        for name, value in self._constants().items():
            self.register_buffer(name, value.to(device), persistent=False)

    def _constants(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        places = [_places(size, generator) for size in self.block_size]
        of_map = torch.arange(0) if self.grid is None else gilbert_order(*self.grid) + self.prefix_tokens
        order = torch.cat((torch.arange(self.prefix_tokens), of_map))
        return dict(order=order, back=order.argsort(), query_places=places[0], key_places=places[1])

    def reset_parameters(self) -> None:
        for name, value in self._constants().items():
            getattr(self, name).copy_(value)

    def init_non_persistent_buffers(self) -> None:  # as timm calls it
        self.reset_parameters()

    def keep_heads(self, heads: list[int]) -> None:
        """Nothing here is one head's."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None, dropout: float = 0.0,
    ) -> Tensor:
        """`scale` is d^-0.5 by default."""
        if bias is not None:
            raise ValueError(f"PyramidSparseAttention takes no masks and no biases of logits, got one of shape {tuple(bias.shape)}")
        if dropout:
            raise ValueError(f"PyramidSparseAttention has no attention weights of tokens that dropout ({dropout}) could leave out")
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms put out another
        tokens, blocks, back = k.shape[2], (self.block_size, scale), None
        if tokens <= self.block_size[1]:
            levels = torch.ones(*q.shape[:2], -(-tokens // self.block_size[0]), 1, dtype=torch.int32, device=q.device)
        else:
            if self.grid is not None:
                if tokens != len(self.order):
                    raise ValueError(f"PyramidSparseAttention with grid {tuple(self.grid)} and prefix_tokens {self.prefix_tokens} takes "
                                     f"{len(self.order)} tokens, got {tokens}")
                q, k, v = (x.index_select(2, self.order) for x in (q, k, v))
                back = self.back
            levels = _levels(q, k, self.query_places, self.key_places, self.block_size, self.mode, self.shares, scale, self.prefix_tokens)
        out = pyramid_sparse_attention(q, k, v, levels, *blocks)
        report(self, levels=levels, attention=lambda: _attention_of_tokens(q, k, levels, *blocks, back))
        return out if back is None else out.index_select(2, back)

    def extra_repr(self) -> str:
        return (f"grid={self.grid}, prefix_tokens={self.prefix_tokens}, block_size={self.block_size}, mode={self.mode!r}, "
                f"shares={self.shares}")


def _attention_of_tokens(
    q: Tensor, k: Tensor, levels: Tensor, block_size: tuple[int, int], scale: float | None, back: Tensor | None
) -> Tensor:
    """What values are multiplied with, (B, heads, N, N): of averages every token has the same part."""
    blocks, (of_queries, of_keys) = levels.shape[3], block_size
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    weights = reference.attention(q, pyramid(k, blocks, of_keys), levels, k.shape[2], of_queries, of_keys, factor)
    weights = weights / counts(k.shape[2], blocks, of_keys, k.device).clamp(min=1)
    parts = weights.split([blocks * (of_keys // level) for level in LEVELS], -1)
    of_levels = [part.repeat_interleave(level, -1)[..., : k.shape[2]] for level, part in zip(LEVELS, parts, strict=True)]
    attention = torch.stack(of_levels).sum(0)
    return attention if back is None else attention.index_select(2, back).index_select(3, back)

