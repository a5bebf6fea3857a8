"""Overlapping windows, with memory for one row of them."""
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import InputError, times
from zoo.reading.masks import label_dtype

SIGMA = 0.125  # of a window's Gaussian weights, over its size; as in MONAI
LEAST = 1e-3  # weight, of the corners


def segment(model: nn.Module, x: Tensor, window: Sequence[int], *, classes: int, overlap: float = 0.25, batch: int = 4,
            progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
    """The most probable class of every position: x (C, *sizes) → (*sizes), of `label_dtype`, on the CPU.

    Logits of overlapping windows are added, see `settled`. Where x is smaller than the window, it is padded on both sides with zeros, as
    MONAI's windows are in evaluation.

    `progress` is called with the numbers of windows done and in all. Raises InputError for a window of other dimensions, and for
    logits that are not finite.
    """
    sizes = tuple(x.shape[1:])
    if len(window) != len(sizes):
        raise InputError(f"the model takes {len(window)}-D input, and this is {len(sizes)}-D, of size {times(sizes)}")
    x, inside = padded(x, window)
    labels = torch.empty(x.shape[1:], dtype=label_dtype(classes))
    for first, sums, _ in settled(model, x, window, channels=classes, overlap=overlap, batch=batch, progress=progress):
        labels[first:first + sums.shape[1]] = sums.argmax(0).to(labels.dtype)
    return labels[inside].clone() if sizes != x.shape[1:] else labels


def settled(model: nn.Module, x: Tensor, window: Sequence[int], *, channels: int, overlap: float = 0.25, batch: int = 4, scale: int = 1,
            progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What a network says of overlapping windows of x (C, *sizes), added: slab for slab along the first axis.

    Gives the first position of each slab, the sums (channels, length, *sizes[1:]) and the sums of the weights (length, *sizes[1:]), on
    the CPU. Weights are Gaussian and favour a window's centre. Windows run along the first axis last, and positions are settled as soon
    as no window is left that holds them: beside x, only `channels` × window[0] numbers per position of the other axes are kept, however
    long the first axis.

    The network gives `channels` for `scale` positions of each of the window's along every axis; sizes and positions of what is
    given here are so many times those of x, which is at least as large as the window.

    Raises InputError for what is not finite.
    """
    check_overlap(overlap)
    sizes = tuple(x.shape[1:])
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    starts = [_starts(n, w, overlap) for n, w in zip(sizes, window, strict=True)]
    rows, places = starts[0], list(itertools.product(*starts[1:]))
    weights = reduce(lambda a, b: a[..., None] * b, [_gaussian(scale * w) for w in window]).clamp(min=LEAST)
    sums = torch.zeros(channels, scale * window[0], *(scale * n for n in sizes[1:]))
    shares = torch.zeros(sums.shape[1:])
    done = 0
    for row, following in zip(rows, [*rows[1:], sizes[0]], strict=True):
        for i in range(0, len(places), batch):
            chunk = places[i:i + batch]
            cuts = [tuple(slice(start, start + w) for start, w in zip(place, window[1:], strict=True)) for place in chunk]
            windows = torch.stack([x[(slice(None), slice(row, row + window[0]), *cut)] for cut in cuts])
            with torch.inference_mode():
                given = model(windows.to(device)).float().cpu()
            if not given.isfinite().all():
                raise InputError("what the network gives is not finite: its weights, or the input, are not, or overflow its precision")
            for cut, values in zip(cuts, given, strict=True):
                at = (slice(None), *(slice(scale * part.start, scale * part.stop) for part in cut))
                sums[(slice(None), *at)] += values * weights
                shares[at] += weights
            done += len(chunk)
            progress(done, len(rows) * len(places))
        length = scale * (following - row)
        yield scale * row, sums[:, :length], shares[:length]
        sums = torch.cat([sums[:, length:], torch.zeros_like(sums[:, :length])], 1)
        shares = torch.cat([shares[length:], torch.zeros_like(shares[:length])])


def padded(x: Tensor, window: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """x (C, *sizes) with zeros on both sides of the axes that are shorter than the window, and where x is in it, without the channels."""
    lacking = [max(0, w - n) for n, w in zip(x.shape[1:], window, strict=True)]
    inside = tuple(slice(lack // 2, lack // 2 + n) for n, lack in zip(x.shape[1:], lacking, strict=True))
    sides = [side for lack in reversed(lacking) for side in (lack // 2, lack - lack // 2)]
    return (F.pad(x, sides) if any(sides) else x), inside


def check_overlap(overlap: float) -> None:
    """Raises InputError unless windows that share so much of their size make progress."""
    if not 0 <= overlap < 1:
        raise InputError(f"overlap is {overlap:g}; it has to be at least 0 and below 1")


def _starts(size: int, window: int, overlap: float) -> list[int]:
    step = max(1, int(window * (1 - overlap)))
    return [*range(0, size - window, step), size - window]


def _gaussian(window: int) -> Tensor:
    place = torch.arange(window) - (window - 1) / 2
    return torch.exp(-0.5 * (place / (SIGMA * window)) ** 2)
