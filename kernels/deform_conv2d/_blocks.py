"""What all blocks of one deformable convolution share, and how it is cut into them."""
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .reference import Pair

SAMPLES_AT_ONCE = 1 << 22  # elements: 16 MiB of float32


class Shape(NamedTuple):
    """Everything that is the same for all blocks."""

    size: Pair
    padded: Pair
    kernel: Pair
    out_size: Pair
    channels: int
    groups: int
    offset_groups: int
    geometry: tuple[Pair, Pair, Pair]  # stride, padding, dilation

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def shape_of(x: Tensor, offset: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Shape:
    kernel, size = tuple(weight.shape[2:]), tuple(x.shape[2:])
    offset_groups = offset.shape[1] // (2 * kernel[0] * kernel[1])
    # Scaling coordinates by a power of two is exact, so that whole positions stay whole.
    padded = tuple(1 << (length - 1).bit_length() for length in size)
    groups = x.shape[1] // weight.shape[1]
    return Shape(size, padded, kernel, tuple(offset.shape[2:]), x.shape[1], groups, offset_groups, (stride, padding, dilation))


def blocks(batch: int, shape: Shape, positions: int) -> Iterator[tuple[slice, list[slice]]]:
    """Images of the batch, of `positions` outputs together or single ones, and the output rows to take of all of them at a time."""
    height, width = shape.out_size
    per_row = max(1, shape.channels * shape.taps * width)
    rows = max(1, SAMPLES_AT_ONCE // per_row)
    images = max(1, min(SAMPLES_AT_ONCE // (per_row * max(1, height)), positions // max(1, height * width)))
    for start in range(0, batch, images):
        yield slice(start, start + images), [slice(row, row + rows) for row in range(0, height, rows)]
