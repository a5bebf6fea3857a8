import torch
from torch import Tensor


def in_layout_of(x: Tensor, out: Tensor) -> Tensor:
    """`out` copied into the memory layout of x where that is contiguous or channels-last, and as it is otherwise."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=memory_format):
            return out.contiguous(memory_format=memory_format)
    return out
