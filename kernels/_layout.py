import torch
from torch import Tensor


def in_layout_of(x: Tensor, out: Tensor) -> Tensor:
    """`out` copied into the memory layout of x where that is contiguous or channels-last, and as it is otherwise."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=memory_format):
            return out.contiguous(memory_format=memory_format)
    return out


def span(maps: Tensor) -> int:
    """Elements between the first and the last of one sample in memory; kernels that count them in 32 bits need it below 2³¹."""
    return sum((length - 1) * stride for length, stride in zip(maps.shape[1:], maps.stride()[1:], strict=True))
