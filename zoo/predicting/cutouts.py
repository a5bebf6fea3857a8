"""Objects cut out of pictures of any size: alpha, masks and pictures with a transparent background."""
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.models.inspyrenet import blend, scaled
from zoo.predicting.answers import Answers, Failed, stop
from zoo.reading.pictures import open_picture, picture_tensor

# The authors' numbers for a base of 384: sides up to which a picture is seen once, and the shorter side of what is seen at most.
ONCE, SHORTER, LARGEST = 512 / 384, 1280 / 384, 1280
ROOM = 2  # pixels of what is seen, over the square of the shorter side's limit, at most
MULTIPLE = 32
HALF = 128  # alpha from which a pixel counts as the object's


@dataclass(frozen=True)
class CutOut:
    """The object in the picture at `path`: `alpha` (H, W) uint8, of its size, and the largest probability that the network saw."""

    path: Path
    alpha: np.ndarray
    certainty: float

    def share(self) -> float:
        """Of the picture, that the object covers."""
        return float((self.alpha >= HALF).mean())

    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the object, the last two not included; zeros where there is none."""
        rows, columns = (np.flatnonzero((self.alpha >= HALF).any(axis)) for axis in (1, 0))
        return (0, 0, 0, 0) if not len(rows) else (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def cut_out(model: nn.Module, picture: Image.Image, mean: Sequence[float], std: Sequence[float], *, base_size: Sequence[int] | None = None,
            resolution: int | None = None) -> tuple[np.ndarray, float]:
    """Alpha (H, W) uint8 of a picture of any size, and the largest σ of the logits.

    The picture is seen at `base_size`, whole. Where it is larger than 4/3 of that on both sides (the authors' 512 for 384), it is seen a
    second time at its own size, and `zoo.models.inspyrenet.blend` makes one answer of both. Alpha is `zoo.models.inspyrenet.scaled`.

    Args:
        model: an `InSPyReNet`, or what gives logits (1, 1, h, w) alone, such as an exported one: that sees pictures once.
        mean, std: of the channels, for pixels from 0 to 1.
        base_size: (height, width); default: the model's.
        resolution: the shorter side for the second look at most; default: 10/3 of the base's, the authors' 1280 for 384, but no more than
            1280. Sizes are rounded to multiples of 32.

    Memory is that of one look at 2 · resolution² pixels at most, however large or wide the picture, and some bytes for each of its pixels.

    Differences from the authors' code (plemeri/InSPyReNet, run/Inference.py, data/custom_transforms.py: dynamic_resize): pictures are made
    smaller with antialiasing, and very wide ones beyond the shorter side's limit, where theirs has no bound.
    """
    base = tuple(base_size or cast(Any, model).base_size)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    limit = resolution or min(LARGEST, round(SHORTER * min(base)))
    if limit < MULTIPLE:
        raise InputError(f"resolution is {limit}; it has to be at least {MULTIPLE}")

    def seen(size: Sequence[int]) -> Tensor:
        small = picture if picture.size == (size[1], size[0]) else picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return picture_tensor(small, mean, std)[None].to(device)

    with torch.inference_mode():
        logits = model(seen(base)).float()
        full = look_at((picture.height, picture.width), limit)
        if min(full) > ONCE * min(base) and hasattr(model, "pyramid"):
            logits = blend(logits, cast(Any, model).pyramid(seen(full))).d0.float()
        if not logits.isfinite().all():
            raise InputError("what the network gives is not finite: its weights, or the input, are not, or overflow its precision")
        alpha, certainty = scaled(logits)[0, 0].cpu().numpy(), logits.max().sigmoid().item()
    whole = Image.fromarray(alpha).resize(picture.size, Image.Resampling.BILINEAR)
    return np.rint(np.asarray(whole) * 255).astype(np.uint8), certainty


def look_at(size: tuple[int, int], limit: int) -> tuple[int, int]:
    """(height, width), multiples of 32, of a picture of `size` whose shorter side is at most `limit`, and its pixels 2 · limit²."""
    height, width = size
    factor = min(1.0, limit / min(size), math.sqrt(ROOM * limit**2 / (height * width)))
    rounded = [max(1, round(n * factor / MULTIPLE)) for n in size]
    most = max(1, math.floor(ROOM * limit**2 / (min(rounded) * MULTIPLE**2)))
    return MULTIPLE * min(rounded[0], most), MULTIPLE * min(rounded[1], most)


def cut_each(model: nn.Module, info: ModelInfo, paths: Iterable[str | Path], *, resolution: int | None = None,
             failed: Failed = stop) -> Iterator[CutOut]:
    """As `cut_out`, one file after the other. What `failed` is called with, a path and why it cannot be done, is left out."""
    base = getattr(model, "base_size", info.input_size[1:])
    if resolution is not None and resolution < MULTIPLE:
        raise InputError(f"resolution is {resolution}; it has to be at least {MULTIPLE}")
    for path in map(Path, paths):
        try:
            picture = open_picture(path, info.input_size[0])
            alpha, certainty = cut_out(model, picture, info.data_config["mean"], info.data_config["std"], base_size=base,
                                       resolution=resolution)
        except InputError as error:
            failed(path, error)
            continue
        yield CutOut(path, alpha, certainty)


class CutOuts(Answers):
    """Pictures with a transparent background, RGBA, and masks, grey, of the pictures' sizes; a table of what the objects cover."""

    columns = ("picture", "share", "certainty", "left", "top", "right", "bottom")
    table = "cutouts.csv"
    suffixes = (".png",)
    endings = (".png", "_mask.png")
    one_sheet = False

    def flat(self, answer: CutOut) -> list[dict]:
        box = dict(zip(self.columns[3:], answer.box(), strict=True))
        return [{"picture": str(answer.path), "share": round(answer.share(), 6), "certainty": round(answer.certainty, 6), **box}]

    def save(self, answer: CutOut, ending: str, path: Path) -> None:
        picture = Image.fromarray(answer.alpha)
        if ending == ".png":
            picture, alpha = open_picture(answer.path), picture
            picture.putalpha(alpha)
        picture.save(path, format="PNG")
