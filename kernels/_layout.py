import torch
from torch import Tensor

from ._backends import in_functorch
from ._exporting import is_exporting


def in_layout_of(x: Tensor, out: Tensor) -> Tensor:
    """`out` copied into the memory layout of x where that is contiguous or channels-last.

    As it is otherwise, in exported graphs and under torch.func: a graph need not ask, which would make guards of sizes, and vmap cannot.
    """
    if is_exporting() or in_functorch():
        return out
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=memory_format):
            return out.contiguous(memory_format=memory_format)
    return out


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) copied into channels-last memory where it is in another; under torch.func as it is, as vmap knows no layouts."""
    return x if in_functorch() else x.contiguous(memory_format=torch.channels_last)


def too_large(*counts: int) -> str | None:
    """Why kernels cannot take a sample of which they count so much in 32 bits, as a clause; None where they can."""
    return None if max(counts) < 2**31 else "a sample spans 2³¹ elements or more"


def span(maps: Tensor) -> int:
    """Elements between the first and the last of one sample in memory."""
    return sum((length - 1) * stride for length, stride in zip(maps.shape[1:], maps.stride()[1:], strict=True))


def position_stride(maps: Tensor) -> int | None:
    """Elements between positions of (B, H, W, …) in memory, row by row; None where rows do not follow each other as positions do."""
    (_, height, width, *_), (_, row, column, *_) = maps.shape, maps.stride()
    if width == 1:
        return row
    return column if height == 1 or row == width * column else None


def even(maps: Tensor) -> Tensor:
    """With rows that follow each other as positions do: a copy, where they do not."""
    return maps if position_stride(maps) is not None else maps.contiguous()
