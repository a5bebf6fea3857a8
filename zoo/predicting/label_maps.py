"""Classes of pixels as pictures: label maps, which hold the numbers of the classes, and overlays to look at."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from zoo.predicting.answers import Answers
from zoo.reading.pictures import open_picture

PALETTE = ((230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60),
           (250, 190, 212), (0, 128, 128), (220, 190, 255), (170, 110, 40), (128, 0, 0), (128, 128, 0), (0, 0, 128))


@dataclass(frozen=True)
class Labelled:
    """The class of every position of the picture or volume at `path`: `labels` (*sizes) are indices of the names `classes`."""

    path: Path
    labels: np.ndarray
    classes: tuple[str, ...]

    def counts(self) -> list[int]:
        """Positions of each class."""
        return np.bincount(self.labels.ravel(), minlength=len(self.classes)).tolist()

    def shares(self) -> list[tuple[str, float]]:
        """Each class with its share of the positions."""
        return [(name, count / self.labels.size) for name, count in zip(self.classes, self.counts(), strict=True)]


def background_and(count: int) -> np.ndarray:
    """Colours (count, 3) uint8: black for the background, which is class 0, and others that repeat where they have to."""
    return np.array([(0, 0, 0), *(PALETTE[i % len(PALETTE)] for i in range(count - 1))], np.uint8)


def label_map(labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A picture whose pixels are the labels themselves: with a palette of `colours`, or of 16 bits where classes are more than 256."""
    if len(colours) > 256:
        return Image.fromarray(labels.astype(np.uint16))
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(colours.astype(np.uint8).tobytes())
    return picture


def overlay(picture: Image.Image, labels: np.ndarray, colours: np.ndarray, clear: int | None = None) -> Image.Image:
    """`picture` half covered by the colours of its classes; positions of the class `clear` stay as they are."""
    pixels = np.asarray(picture.convert("RGB"))
    mixed = ((pixels.astype(np.uint16) + colours[labels]) // 2).astype(np.uint8)
    return Image.fromarray(mixed if clear is None else np.where((labels == clear)[..., None], pixels, mixed))


class LabelMaps(Answers):
    """Label maps of pictures, and overlays beside them, all of the picture's size; a table of the classes' shares."""

    columns = ("picture", "label", "class", "pixels", "share")
    suffixes = (".png",)
    endings = (".png", "_overlay.png")
    one_sheet = False

    def __init__(self, inputs: Sequence[Path], output: str | Path, colours: np.ndarray, clear: int | None = None):
        super().__init__(inputs, output)
        self.colours, self.clear = colours, clear

    def flat(self, answer: Labelled) -> list[dict]:
        return [{"picture": str(answer.path), "label": label, "class": name, "pixels": count, "share": round(count / answer.labels.size, 6)}
                for label, (name, count) in enumerate(zip(answer.classes, answer.counts(), strict=True))]

    def save(self, answer: Labelled, ending: str, path: Path) -> None:
        if ending == ".png":
            label_map(answer.labels, self.colours).save(path)
        else:
            overlay(open_picture(answer.path), answer.labels, self.colours, self.clear).save(path)
