"""Keys and values averaged over groups of 1, 2, 4 and 8 tokens, level after level in one tensor, the pyramid.

Level ℓ of a block of keys has block / ℓ rows. The last group may lie partly beyond the tokens, or wholly: it is the mean of the tokens
that there are, or 0.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checking import check_whole

LEVELS = (1, 2, 4, 8)


def pyramid(x: Tensor, blocks: int, block: int) -> Tensor:
    """(B, heads, M, d) → (B, heads, rows, d), rows = blocks · block · 15 / 8. Differentiable."""
    inner = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x, (0, 0, 0, blocks * block - x.shape[2]))
    parts = [padded]
    for level, count in zip(LEVELS[1:], _counts(x.shape[2], blocks, block, x.device)[1:], strict=True):
        sums = padded.unflatten(2, (blocks * (block // level), level)).sum(3, dtype=inner)
        parts.append((sums / count.clamp(min=1)[:, None]).to(x.dtype))
    return torch.cat(parts, 2)


def counts(tokens: int, blocks: int, block: int, device: torch.device) -> Tensor:
    """How many tokens every row of the pyramid is the mean of: (rows,), 0 to 8."""
    return torch.cat(_counts(tokens, blocks, block, device))


def _counts(tokens: int, blocks: int, block: int, device: torch.device) -> list[Tensor]:
    return [(tokens - level * torch.arange(blocks * (block // level), device=device)).clamp(0, level) for level in LEVELS]


def kept(levels: Tensor, block: int) -> Tensor:
    """Which rows of the pyramid levels (…, key blocks) choose: (…, rows). Some of them may be 0."""
    chosen = [(levels == level)[..., None].expand(*levels.shape, block // level).flatten(-2) for level in LEVELS]
    return torch.cat(chosen, -1)


def check_block_size(function: str, block_size: Any) -> None:
    """That this is a pair of whole numbers, of queries and keys."""
    if not isinstance(block_size, (tuple, list)) or len(block_size) != 2:
        raise ValueError(f"{function}: block_size must be a pair, of queries and keys, got {block_size!r}")
    check_whole(function, "block_size", 1, *block_size)
    if block_size[1] % LEVELS[-1]:
        raise ValueError(f"{function}: block_size must have a multiple of 8 as its second number, got {tuple(block_size)}")


def check_levels(levels: Tensor) -> None:
    """Of the values on the CPU only: elsewhere they cannot be read without waiting."""
    if levels.device.type != "cpu":
        return
    allowed = torch.tensor((0, *LEVELS), dtype=levels.dtype)
    if (wrong := levels[~torch.isin(levels, allowed)]).numel():
        raise ValueError(f"pyramid_sparse_attention: levels must be 0, 1, 2, 4 or 8, got {wrong[0].item()}")
