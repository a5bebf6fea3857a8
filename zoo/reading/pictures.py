"""Pictures in files, as networks see them."""
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from zoo.errors import InputError, near_misses

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def find_pictures(inputs: Iterable[str | Path]) -> list[Path]:
    """The files among `inputs` and the pictures below the folders among them. Raises InputError if there are none."""
    found = []
    for given in map(Path, inputs):
        if given.is_dir():
            below = sorted(path for path in given.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
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


def open_picture(path: str | Path, channels: int = 3) -> Image.Image:
    """The picture at `path`, turned upright as its EXIF data say, in 8 bits: RGB, or grey for one channel.

    Integers of more than 8 bits count as 16 bits, 65535 being white; of floats, 1 is white.

    Raises InputError for a file that is not a picture, a damaged one, and one with values beyond these.
    """
    if channels not in (1, 3):
        raise InputError(f"the model takes images of {channels} channels; pictures have 1 or 3")
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow would clip to 255
                picture = _in_8_bits(picture)
            return picture.convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture that can be read") from None
    except Exception as error:  # a damaged file surfaces as whatever its decoder stumbles over
        raise InputError(f"the picture {path} cannot be read: {error}") from error


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
