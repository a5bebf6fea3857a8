"""Pictures with maps of where people looked in them, and how networks see those."""
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.errors import InputError, times
from zoo.reading.pictures import open_picture

GREY = 126  # around a picture; of maps it is 0
FOLDERS = {name: role for role, names in {
    "picture": ("images", "image", "imgs", "img", "pictures", "photos", "stimuli", "stimulus"),
    "map": ("maps", "map", "fixation_maps", "fixationmaps", "fixmaps", "saliency", "saliency_maps", "densities", "density"),
    "fixations": ("fixations", "fixation", "fixation_points", "fixationlocs", "points"),
}.items() for name in names}


def within(size: tuple[int, int], into: Sequence[int]) -> tuple[int, int, int, int]:
    """Where a picture of `size`, (width, height), lies in what is seen of it, `into`, (height, width): left, top, width, height."""
    ratio = min(into[0] / size[1], into[1] / size[0])
    width, height = (min(most, max(1, round(n * ratio))) for n, most in zip(size, (into[1], into[0]), strict=True))
    return (into[1] - width) // 2, (into[0] - height) // 2, width, height


def fitted(picture: Image.Image, size: Sequence[int], around: int = GREY) -> Image.Image:
    """The picture as large as it fits into `size`, (height, width), in the middle, and `around` it grey (the authors' 126 of MSI-Net).

    It is made smaller by areas, larger bicubic. Difference from the authors' code (alexanderkroner/saliency, data.py): TensorFlow 1's
    `align_corners` lays the centres of the corner pixels on one another; here pixels are areas.
    """
    left, top, width, height = within(picture.size, size)
    shrinks = width < picture.width or height < picture.height
    small = picture.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
    if (height, width) == tuple(size):
        return small
    bands = len(picture.getbands())
    whole = Image.new(picture.mode, (size[1], size[0]), (around,) * bands if bands > 1 else around)
    whole.paste(small, (left, top))
    return whole


def read_map(path: str | Path, picture: str | Path, size: tuple[int, int]) -> Image.Image:
    """The map of fixations in a grey picture, of `size`, (width, height), which is that of its `picture`.

    Raises InputError for a file that is no picture, for one of another size, and for a map that is 0 everywhere.
    """
    found = open_picture(path, 1)
    if found.size != size:
        raise InputError(f"the map {path} is of shape {times(found.size[::-1])}, its picture {picture} of {times(size[::-1])}")
    if found.getextrema()[1] == 0:
        raise InputError(f"the map {path} is 0 everywhere: there is nothing to learn where people looked in {picture}")
    return found


def read_points(path: str | Path, picture: str | Path, size: tuple[int, int]) -> Tensor:
    """(H, W) of 0 and 1, which pixels were fixated: those of the grey picture that are not 0. Raises InputError as `read_map`."""
    return torch.from_numpy((np.asarray(read_map(path, picture, size)) > 0).astype(np.float32))


def fitted_points(points: Tensor, into: Sequence[int]) -> Tensor:
    """Fixated pixels (H, W) where they lie in what is seen of the picture, `into`: (height, width) of 0 and 1."""
    left, top, width, height = within((points.shape[1], points.shape[0]), into)
    rows, columns = points.nonzero(as_tuple=True)
    found = torch.zeros(*into)
    found[top + rows * height // points.shape[0], left + columns * width // points.shape[1]] = 1
    return found


def read_listed(path: Path, split: str) -> list[tuple[Path, Path, Path | None]]:
    """Picture, map and, if there is one, picture of fixated pixels of every row that the CSV at `path` has for `split`.

    Its columns are split, path, label, the map, and fixations. Raises InputError for another file, and for no rows.
    """
    if not path.is_file():
        raise InputError(f"there is no list of samples {path}; set data_root to the folder that holds it")
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
        found = [(Path(row["path"]), Path(row["label"]), Path(row["fixations"]) if row.get("fixations") else None) for row in rows]
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no list of samples, a CSV with the columns split, path, label and fixations: {error!r}") from error
    if not found:
        raise InputError(f"{path} lists no samples for {split}")
    return found


def write_listed(path: Path, rows: Iterable[tuple[str, Path, Path, Path | None]]) -> None:
    """Writes what `read_listed` reads: split, picture, map, fixated pixels."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("split", "path", "label", "fixations"))
        table.writerows((split, picture.absolute(), looked.absolute(), points.absolute() if points else "")
                        for split, picture, looked, points in rows)
