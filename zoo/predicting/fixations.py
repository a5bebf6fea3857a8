"""Where people look in pictures of any size: maps, and heat over the pictures."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.predicting.answers import Answers, Failed, stop
from zoo.reading.fixations import fitted
from zoo.reading.pictures import open_picture, picture_tensor

HEAT = ((0, 0, 0), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # from 0 to 1, ever lighter
COVERED = 0.8  # of a picture, by heat, where the map is highest


@dataclass(frozen=True)
class Looked:
    """Where people look in the picture at `path`: `saliency` (H, W) uint8, of the picture's size."""

    path: Path
    saliency: np.ndarray

    def peak(self) -> tuple[int, int]:
        """Column and row of the highest value, the first one in reading order."""
        row, column = np.unravel_index(int(self.saliency.argmax()), self.saliency.shape)
        return int(column), int(row)

    def focus(self) -> float:
        """The share of the picture that holds half of the map's sum, of its highest values: small where all look at one place."""
        counts = np.bincount(self.saliency.ravel(), minlength=256)[::-1].astype(np.float64)
        sums = np.cumsum(counts * np.arange(255, -1, -1))
        if sums[-1] == 0:
            return 1.0
        last = int(np.searchsorted(sums, sums[-1] / 2))
        before = sums[last - 1] if last else 0.0
        return float((counts[:last].sum() + (sums[-1] / 2 - before) / (255 - last)) / counts.sum())


def look(model: nn.Module, picture: Image.Image, mean: Sequence[float], std: Sequence[float], size: Sequence[int]) -> np.ndarray:
    """(H, W) uint8, of the picture's size: the map that the network gives, 255 at its highest.

    The picture is seen at `size`, (height, width), its sides in proportion and grey around it, see `zoo.reading.fixations.fitted`; the map
    is cut back by `cut_back`. Memory is that of one look and some bytes for each of the picture's pixels.

    Raises InputError for answers that are not finite.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    seen = picture_tensor(fitted(picture, size), mean, std)[None].to(device)
    with torch.inference_mode():
        answer = model(seen).float().cpu()[0, 0]
    if not answer.isfinite().all():
        raise InputError("what the network gives is not finite: its weights, or the input, are not, or overflow its precision")
    return np.rint(255 * cut_back(answer, (picture.height, picture.width)).numpy()).astype(np.uint8)


def cut_back(answer: Tensor, size: Sequence[int]) -> Tensor:
    """The map (h, w), from 0 to 1, of a picture of `size` that was `fitted` into it: (height, width), from 0 to 1.

    It is enlarged until it covers the size, by areas where that makes it smaller and else bicubic, and the middle is taken.

    Difference from the authors' code (alexanderkroner/saliency, data.py: postprocess_saliency_map): what lies outside the middle is not
    computed, and pixels are areas, where TensorFlow 1 lays the centres of the corners on one another.
    """
    height, width = size
    h, w = answer.shape
    ratio = max(height / h, width / w)
    whole = max(height, round(h * ratio)), max(width, round(w * ratio))
    top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
    box = (left * w / whole[1], top * h / whole[0], (left + width) * w / whole[1], (top + height) * h / whole[0])
    way = Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC
    cut = Image.fromarray(answer.numpy().astype(np.float32)).resize((width, height), way, box=box)
    return torch.from_numpy(np.array(cut)).clamp(0, 1)


def look_each(model: nn.Module, info: ModelInfo, paths: Iterable[str | Path], *, failed: Failed = stop) -> Iterator[Looked]:
    """Maps of pictures, one after the other, each seen at the size that the network was trained for.

    `failed` is called with the path of a file that cannot be read and why; it is then left out.
    """
    config = info.data_config
    for path in map(Path, paths):
        try:
            yield Looked(path, look(model, open_picture(path, info.input_size[0]), config["mean"], config["std"], info.input_size[1:]))
        except InputError as error:
            failed(path, error if str(path) in str(error) else InputError(f"{path}: {error}"))


def heat(picture: Image.Image, saliency: np.ndarray) -> Image.Image:
    """The picture, the more covered by heat the higher the map (H, W) uint8 is."""
    share = np.arange(256) / 255
    colours = np.stack([np.interp(share, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT, strict=True)], 1)
    over = Image.fromarray(np.rint(colours).astype(np.uint8)[saliency])
    return Image.composite(over, picture.convert("RGB"), Image.fromarray(np.rint(COVERED * 255 * share).astype(np.uint8)[saliency]))


class FixationMaps(Answers):
    """Maps of pictures, and the pictures under heat beside them; a table of where the maps are highest."""

    columns = ("picture", "peak_x", "peak_y", "half_in")
    suffixes = (".png",)
    endings = (".png", "_overlay.png")
    one_sheet = False

    def flat(self, answer: Looked) -> list[dict]:
        x, y = answer.peak()
        return [dict(zip(self.columns, (str(answer.path), x, y, round(answer.focus(), 4)), strict=True))]

    def save(self, answer: Looked, ending: str, path: Path) -> None:
        picture = Image.fromarray(answer.saliency) if ending == ".png" else heat(open_picture(answer.path), answer.saliency)
        picture.save(path)
