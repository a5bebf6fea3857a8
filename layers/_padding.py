import torch.nn.functional as F
from torch import Tensor

from zoo.kernels._exporting import is_exporting


def pad_to_multiple(x: Tensor, of: int) -> Tensor:
    """(B, C, H, W) with zeros at the bottom and on the right, so that `of` divides height and width; x itself where it does."""
    height, width = x.shape[2:]
    bottom, right = ((n + of - 1) // of * of - n for n in (height, width))
    return F.pad(x, (0, right, 0, bottom)) if is_exporting() or bottom or right else x
