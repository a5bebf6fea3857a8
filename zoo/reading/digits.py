"""scikit-learn's handwritten digits: one by one, in scenes that are composed of them, and those scenes as files of the toolboxes.

Two kinds of scenes are there, and what was measured hangs on every pixel of either: colourful ones of digits in any size, with a mask
for each, and grey ones of small, turned digits, with one map of classes.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from zoo.errors import InputError, require
from zoo.files import make_folder, replacing
from zoo.reading import yolo
from zoo.reading.coco import box, run_lengths
from zoo.reading.masks import check_split

LAYOUTS = ("coco", "yolo")
CLASSES = tuple(map(str, range(10)))
HELD_OUT = 360  # of the 1797 digits
COLOURFUL_SIDES, GREY_SIDES = (28, 49), (14, 25)  # pixels of a digit, the latter excluded; of the former before it is cut to its ink
COLOURFUL_INK, GREY_INK = 0.3, 0.4  # share of full black above which a pixel is of the digit


class Digits:
    """scikit-learn's 1797 handwritten digits, 8×8 grey pixels each, scaled up to `size`×`size` pixels.

    The split is fixed: 360 digits, drawn once with equal shares of the classes, are the "val" part, the rest "train".

    Args:
        split: "train" or "val".
        size: pixels on a side.
        mode: PIL's mode of the images, "L" (one channel) or "RGB".
        limit: use only that many of the images.

    Raises InputError for another split or mode, and without scikit-learn.
    """

    def __init__(self, split: str, size: int = 32, mode: str = "L", limit: int | None = None):
        check_split(split)
        if mode not in ("L", "RGB"):
            raise InputError(f"mode={mode!r}: it is 'L' or 'RGB'")
        require("reading digits", "train", "sklearn")
        from sklearn.datasets import load_digits  # takes a second, which other data need not wait for
        from sklearn.model_selection import train_test_split

        pixels, targets = cast(tuple[np.ndarray, np.ndarray], load_digits(return_X_y=True))
        pixels = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        parts = cast(list[np.ndarray], train_test_split(pixels, targets, test_size=HELD_OUT, stratify=targets, random_state=0))
        pixels, targets = parts[0::2] if split == "train" else parts[1::2]
        upsample = lambda digit: Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC).convert(mode)  # noqa: E731
        self.images = [upsample(digit) for digit in pixels[:limit]]
        self.targets = targets[:limit].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]

    def draw(self, random: np.random.Generator) -> tuple[Image.Image, int]:
        """Any of them."""
        return self.read(int(random.integers(len(self))))


@dataclass(frozen=True)
class DigitScene:
    """A picture (H, W, 3) uint8, and of every digit in it the class and the mask (H, W) bool of its ink. Masks are disjoint."""

    picture: np.ndarray
    labels: list[int]
    masks: list[np.ndarray]

    @property
    def label_map(self) -> np.ndarray:
        """(H, W) uint8: 0 the ground, 1 + digit its ink."""
        inks = [mask * (label + 1) for label, mask in zip(self.labels, self.masks, strict=True)]
        return cast(np.ndarray, np.sum(inks, axis=0, dtype=np.uint8))


def colourful_scene(digits: Digits, size: int, random: np.random.Generator) -> DigitScene:
    """Two to four digits in random colours, sizes and places, their boxes apart, on a noisy ground of another colour."""
    ground = random.uniform(0, 110, 3)
    picture = ground + random.normal(0, 8, (size, size, 1)) + random.normal(0, 20, 3) * np.linspace(-1, 1, size)[:, None, None]
    taken = np.zeros((size, size), bool)
    labels, masks = [], []
    wanted = random.integers(2, 5)
    for _ in range(50):
        image, label = digits.draw(random)
        ink = _scaled(image, int(random.integers(*COLOURFUL_SIDES)), Image.Resampling.BICUBIC)
        rows, columns = (np.flatnonzero((ink > COLOURFUL_INK).any(axis)) for axis in (1, 0))
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if (place := _free_place(taken, ink.shape, random)) is None:
            continue
        colour = random.uniform(160, 255, 3)
        picture[place] += ink[..., None] * (colour - picture[place])
        mask = np.zeros((size, size), bool)
        mask[place] = ink > COLOURFUL_INK
        labels.append(label)
        masks.append(mask)
        if len(labels) == wanted:
            break
    return DigitScene(picture.clip(0, 255).astype(np.uint8), labels, masks)


def grey_scene(digits: Digits, size: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """3 to 6 digits of 14 to 24 pixels, each turned by up to 15°, at places where they overlap no other, on a grey, noisy ground.

    The picture (H, W) float64 from 0 to 1, and the label map (H, W) uint8: 0 the ground, 1 + digit its ink.
    """
    picture = random.uniform(0.0, 0.3) + random.normal(0.0, 0.05, (size, size))
    labels = np.zeros((size, size), np.uint8)
    taken = np.zeros((size, size), bool)
    for _ in range(random.integers(3, 7)):
        image, label = digits.draw(random)
        side, turn = int(random.integers(*GREY_SIDES)), float(random.uniform(-15, 15))
        ink = _scaled(image.rotate(turn, Image.Resampling.BILINEAR), side, Image.Resampling.BILINEAR)
        if (place := _free_place(taken, ink.shape, random)) is None:
            continue
        picture[place] = np.maximum(picture[place], ink * random.uniform(0.6, 1.0))
        labels[place] = np.where(ink > GREY_INK, label + 1, 0)
    return picture.clip(0, 1), labels


def _scaled(image: Image.Image, side: int, resampling: Image.Resampling) -> np.ndarray:
    """(side, side), from 0 to 1."""
    return np.asarray(image.resize((side, side), resampling)) / 255


def _free_place(taken: np.ndarray, shape: tuple[int, ...], random: np.random.Generator) -> tuple[slice, slice] | None:
    """Any place of that shape on the map `taken`, which is then taken; None if some of it was."""
    top, left = (int(random.integers(0, whole - part + 1)) for whole, part in zip(taken.shape, shape, strict=True))
    place = slice(top, top + shape[0]), slice(left, left + shape[1])
    if taken[place].any():
        return None
    taken[place] = True
    return place


def write_digit_scenes(root: str | Path, train: int = 1000, val: int = 100, size: int = 96, seed: int = 0,
                       progress: Callable[[str, int, int], None] = lambda split, done, scenes: None, layout: str = "coco") -> None:
    """Writes under `root`, for the splits train and val, whose scenes share no digit, in the layout "coco":

        images/SPLIT/000000.png …            the pictures
        annotations/instances_SPLIT.json     COCO: boxes, masks as uncompressed run lengths, categories 0 to 9
        annotations/SPLIT/000000.png …       mmsegmentation: label maps, 0 the ground, 1 + digit its ink

    and in the layout "yolo", see `zoo.reading.yolo`:

        images/SPLIT/000000.png …            the pictures
        labels/SPLIT/000000.txt …            of every digit the class and the outline of its ink
        digits.yaml                          the data of models that detect, and of those that segment
        pose/…, digits-pose.yaml             the same scenes with boxes and key points: the ends of the ink

    The scenes depend on the arguments alone. `progress` is called with the split, and how many of its scenes are done.

    Raises InputError for another layout, counts below 1, for a size in which no digit has room, and where nothing can be written.
    """
    if layout not in LAYOUTS:
        raise InputError(f"the layout is one of {', '.join(LAYOUTS)}, not {layout!r}")
    if min(train, val) < 1 or size < COLOURFUL_SIDES[1]:
        raise InputError(f"{train} and {val} scenes of {size} pixels: there has to be one of each at least, of {COLOURFUL_SIDES[1]} pixels "
                         "or more")
    root = Path(root)
    for number, (split, scenes) in enumerate((("train", train), ("val", val))):
        digits = Digits(split)
        write = (_CocoWriter if layout == "coco" else _YoloWriter)(root, split)
        for index in range(scenes):
            write(f"{index:06d}", colourful_scene(digits, size, np.random.default_rng((seed, number, index))))
            progress(split, index + 1, scenes)
        write.finish()


class _CocoWriter:
    def __init__(self, root: Path, split: str):
        self.pictures, self.maps = root / "images" / split, root / "annotations" / split
        self.index = root / "annotations" / f"instances_{split}.json"
        for folder in (self.pictures, self.maps):
            make_folder(folder)
        self.coco: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(CLASSES)]}

    def __call__(self, stem: str, scene: DigitScene) -> None:
        height, width = scene.picture.shape[:2]
        for folder, pixels in ((self.pictures, scene.picture), (self.maps, scene.label_map)):
            _save(folder / f"{stem}.png", pixels)
        self.coco["images"].append({"id": int(stem), "file_name": f"{stem}.png", "width": width, "height": height})
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            self.coco["annotations"].append({
                "id": len(self.coco["annotations"]) + 1, "image_id": int(stem), "category_id": label, "iscrowd": 0,
                "area": int(mask.sum()), "bbox": box(mask), "segmentation": run_lengths(mask)})

    def finish(self) -> None:
        with replacing(self.index) as written:
            written.write_text(json.dumps(self.coco))


class _YoloWriter:
    def __init__(self, root: Path, split: str):
        self.root, self.split = root, split
        self.whole, self.pose = (
            (folder / "images" / split, folder / "labels" / split) for folder in (root, root / "pose"))
        for folder in (*self.whole, *self.pose):
            make_folder(folder)

    def __call__(self, stem: str, scene: DigitScene) -> None:
        for (pictures, labels), line in ((self.whole, yolo.segment_line), (self.pose, yolo.pose_line)):
            _save(pictures / f"{stem}.png", scene.picture)
            with replacing(labels / f"{stem}.txt") as written:
                written.write_text("".join(f"{line(label, mask)}\n" for label, mask in zip(scene.labels, scene.masks, strict=True)))

    def finish(self) -> None:
        for name, folder, points in (("digits", self.root, ()), ("digits-pose", self.root / "pose", yolo.ENDS)):
            with replacing(self.root / f"{name}.yaml") as written:
                written.write_text(yolo.data_file(folder, CLASSES, points))


def _save(path: Path, pixels: np.ndarray) -> None:
    with replacing(path) as written:
        Image.fromarray(pixels).save(written)
