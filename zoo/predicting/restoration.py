"""Pictures by networks that restore them, in overlapping tiles with bounded memory."""
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError, times
from zoo.predicting.answers import Answers, Failed, stop
from zoo.predicting.sliding_windows import settled
from zoo.reading.pictures import open_picture
from zoo.reading.shrinking import whole

TILE, OVERLAP = 256, 0.125  # pixels on a side of what the network sees at once, and the share that the next tile sees too


@dataclasses.dataclass(frozen=True)
class Restored:
    """The picture that a network makes of the one at `path`, of `size`, its width and height."""

    path: Path
    size: tuple[int, int]
    picture: Image.Image


class Pixels(nn.Module):
    """A network as a function of pixels, see `of_pixels`; with `ensemble`, the network's `self_ensemble`."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], ensemble: bool = False):
        super().__init__()
        self.model, self.mean, self.std, self.ensemble = model, mean, std, ensemble

    def forward(self, pixels: Tensor) -> Tensor:
        network = partial(self_ensemble, self.model) if self.ensemble else self.model
        return of_pixels(network, pixels, self.mean, self.std)


def of_pixels(network: Callable[[Tensor], Tensor], pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, H, W) uint8 → (B, C, scale·H, scale·W), floats from 0 to 255 or nearly so, by a network of pixels in [0, 1] less `mean`,
    over `std`."""
    shift, factor = (255 * torch.tensor(values, device=pixels.device)[:, None, None] for values in (mean, std))
    return network((pixels.float() - shift) / factor) * factor + shift


def self_ensemble(model: nn.Module, x: Tensor) -> Tensor:
    """The mean of what the network gives for the eight ways to turn and mirror x, each turned back ("HAN+" is HAN so)."""
    total = 0
    for turned in (False, True):
        for flips in ((), (2,), (3,), (2, 3)):
            given = x.transpose(2, 3) if turned else x
            found = model(given.flip(flips).contiguous()).flip(flips)
            total = total + (found.transpose(2, 3) if turned else found)
    return cast(Tensor, total) / 8


def restore(model: nn.Module, info: ModelInfo, pixels: Tensor, *, window: Sequence[int] | None = None, overlap: float = OVERLAP,
            ensemble: bool = False, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
    """(C, H, W) uint8 → (C, scale·H, scale·W) uint8.

    What is no larger than a tile is seen whole. Of larger pictures tiles are, and where they overlap their answers flow into one
    another; beside the two pictures there is memory for one row of tiles.

    Args:
        window: height and width of tiles; default 256×256.
        overlap: share of a tile that its neighbours cover too.
        ensemble: see `self_ensemble`; eight times the work.
        progress: called with the numbers of tiles done and in all.

    Raises InputError for a window that is none, and for answers that are not finite.
    """
    window = (TILE, TILE) if window is None else tuple(window)
    if len(window) != 2 or min(window) < 1:
        raise InputError(f"the window is {times(window)}, where {info.name} needs 2 sizes of at least 1")
    network = Pixels(model, info.data_config["mean"], info.data_config["std"], ensemble)
    window, scale = [min(side, length) for side, length in zip(window, pixels.shape[1:], strict=True)], scale_of(model)
    restored = torch.empty(len(pixels), *(scale * length for length in pixels.shape[1:]), dtype=torch.uint8)
    for first, sums, shares in settled(network, pixels, window, channels=len(pixels), overlap=overlap, batch=1, scale=scale,
                                       progress=progress):
        restored[:, first:first + sums.shape[1]] = whole(sums / shares)
    return restored


def scale_of(model: nn.Module) -> int:
    """How many times larger a picture gets."""
    return cast(int, model.scale)


def restore_each(model: nn.Module, info: ModelInfo, files: Iterable[Path], *, window: Sequence[int] | None = None,
                 overlap: float = OVERLAP, ensemble: bool = False,
                 progress: Callable[[Path, int, int], None] = lambda path, done, total: None, failed: Failed = stop) -> Iterator[Restored]:
    """Restores pictures, one after the other. Arguments as in `restore`, `progress` with the file before them.

    `failed` is called with the path of a file that cannot be read or restored and why; it is then left out.
    """
    for path in files:
        def show(done: int, total: int, path: Path = path) -> None:
            progress(path, done, total)

        try:
            picture = open_picture(path, info.input_size[0])
            pixels = torch.from_numpy(np.array(picture).reshape(picture.height, picture.width, -1)).permute(2, 0, 1)
            found = restore(model, info, pixels, window=window, overlap=overlap, ensemble=ensemble, progress=show)
        except InputError as error:
            failed(path, error if str(path) in str(error) else InputError(f"{path}: {error}"))
            continue
        yield Restored(path, picture.size, Image.fromarray(found.permute(1, 2, 0).squeeze(2).numpy()))


class RestoredPictures(Answers):
    """The pictures themselves, under the names of those that were given; a table of their sizes."""

    columns = ("picture", "width", "height", "restored_width", "restored_height")
    suffixes = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
    one_sheet = False

    def flat(self, answer: Restored) -> list[dict]:
        return [dict(zip(self.columns, (str(answer.path), *answer.size, *answer.picture.size), strict=True))]

    def save(self, answer: Restored, ending: str, path: Path) -> None:
        answer.picture.save(path, quality=95) if self.suffix in (".jpg", ".jpeg", ".webp") else answer.picture.save(path)
