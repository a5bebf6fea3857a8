"""Pictures in files, as networks see them."""
import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from torch import Tensor

from zoo.errors import InputError, near_misses

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UPRIGHT, TURNED_ASIDE = 1, (5, 6, 7, 8)  # orientations of EXIF: the latter swap width and height
MAX_PIXELS = "ZOO_MAX_PIXELS"
_changing_limit = threading.Lock()


def files_below(folder: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files in `folder` and its sub-folders whose names end in `suffixes`, sorted.

    Hidden files and folders, whose names begin with a dot, are left out, such as the `._NAME` that macOS puts beside a file NAME.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += (Path(place, name) for name in names if name.lower().endswith(suffixes) and not name.startswith("."))
    return sorted(found)

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def find_pictures(inputs: Iterable[str | Path]) -> list[Path]:
    """The files among `inputs` and the pictures below the folders among them. Raises InputError if there are none."""
    found = []
    for given in map(Path, inputs):
        if given.is_dir():
            below = files_below(given, PICTURE_SUFFIXES)
            if not below:
                raise InputError(f"the folder {given} holds no picture ({' '.join(PICTURE_SUFFIXES)})")
            found += below
        elif given.name.lower().endswith(ARCHIVES) and given.exists():
            raise InputError(f"{given} is an archive; unpack it, and give the folder")
        elif given.exists():
            found.append(given)
        else:
            others = [other.name for other in given.parent.iterdir()] if given.parent.is_dir() else []
            raise InputError(f"there is no picture {given}{near_misses(given.name, others)}")
    return found


def open_picture(path: str | Path | BinaryIO, channels: int = 3) -> Image.Image:
    """The picture at `path`, or in an open file, turned upright as its EXIF data say, in 8 bits: RGB, or grey for one channel.

    Integers of more than 8 bits count as 16 bits, 65535 being white; of floats, 1 is white.

    Raises InputError for a file that is not a picture, a damaged one, one with values beyond these, and one of too many pixels, see
    `opening`.
    """
    if channels not in (1, 3):
        raise InputError(f"the model takes images of {channels} channels; pictures have 1 or 3")
    with opening(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow would clip to 255
            picture = _in_8_bits(picture)
        return picture.convert("RGB" if channels == 3 else "L")


@contextlib.contextmanager
def opening(path: str | Path | BinaryIO, called: str = "picture") -> Iterator[Image.Image]:
    """The picture at `path`, or in an open file, as it is stored, of which only the head has been read.

    Raises InputError for a file that is none, for what is found to be damaged inside the block, and for more pixels than Pillow takes
    for harmless, 178 million, or than the environment variable ZOO_MAX_PIXELS says.
    """
    by_name = isinstance(path, str | Path)
    called = f"{called} {path}" if by_name else called
    try:
        # of a file by name Pillow maps an uncompressed TIFF into memory, and then takes width for height where EXIF says to turn it
        with Path(path).open("rb") if by_name else contextlib.nullcontext(path) as file, _open(file) as opened:
            yield opened
    except InputError:
        raise
    except (UnidentifiedImageError, ImportError):  # Ultralytics makes Pillow look for one more decoder, which need not be there
        raise InputError(f"the {called} is not a picture that can be read") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"the {called} cannot be read: {error}, if it is none: set the environment variable {MAX_PIXELS} to the "
                         "number of pixels that are to be read") from error
    except Exception as error:  # a damaged file surfaces as whatever its decoder stumbles over
        raise InputError(f"the {called} cannot be read: {error}") from error


def _open(file: BinaryIO) -> Image.Image:
    limit = os.environ.get(MAX_PIXELS)
    if limit is None:
        return Image.open(file)
    if not limit.isdecimal():
        raise InputError(f"{MAX_PIXELS}={limit}: it is a whole number, of pixels")
    with _changing_limit:  # the limit is the process's
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            opened = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = usual
    if opened.width * opened.height > int(limit):
        raise ValueError(f"it has {opened.width * opened.height} pixels, and {MAX_PIXELS}={limit}")
    return opened


def orientation(picture: Image.Image) -> int:
    """From 2 to 8 as EXIF defines it, or `UPRIGHT` where nothing has to be done to see the picture as it was taken."""
    turn = picture.getexif().get(Base.Orientation, UPRIGHT)
    return turn if turn in range(2, 9) else UPRIGHT


def seen_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of a picture, as it is stored, when it is turned upright."""
    aside = orientation(picture) in TURNED_ASIDE and picture.format != "TIFF"  # Pillow says of TIFF how large it is to be seen
    return (picture.height, picture.width) if aside else picture.size


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey, of integers of 16 bits or floats from 0 to 1. Raises ValueError for other values: nothing says which of them is white."""
    values, white = np.asarray(picture), 1 if picture.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # written so that NaN is refused
        raise ValueError(f"its values go from {low:g} to {high:g}, where integers of 8 or 16 bits or floats from 0 to 1 are needed")
    return Image.fromarray(((values * 255).round() if white == 1 else values // 257).astype(np.uint8))


def picture_tensor(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(C, H, W): pixels between 0 and 1, less the mean of their channel, over its standard deviation."""
    pixels = np.asarray(picture, np.float32).reshape(picture.height, picture.width, len(mean)) / 255
    return torch.from_numpy((pixels - np.array(mean, np.float32)) / np.array(std, np.float32)).permute(2, 0, 1).contiguous()
