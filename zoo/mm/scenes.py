"""Scenes of scikit-learn's handwritten digits, written as COCO and as mmsegmentation keep pictures."""
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from zoo.errors import InputError
from zoo.files import make_folder, replacing
from zoo.mm.datasets import DigitsDataset

INK = 0.3  # share of full black above which a pixel is of the digit
SIDES = (28, 49)  # pixels of a digit before it is cut to its ink
CLASSES = tuple(map(str, range(10)))


@dataclass(frozen=True)
class DigitScene:
    """A picture (H, W, 3) uint8, and of every digit in it the class and the mask (H, W) bool of its ink. Masks are disjoint."""

    picture: np.ndarray
    labels: list[int]
    masks: list[np.ndarray]

    @property
    def label_map(self) -> np.ndarray:
        """(H, W) uint8: 0 the ground, 1 + digit its ink."""
        return np.sum([mask * (label + 1) for label, mask in zip(self.labels, self.masks, strict=True)], axis=0, dtype=np.uint8)


def compose(digits: DigitsDataset, size: int, random: np.random.Generator) -> DigitScene:
    """Two to four digits in random colours, sizes and places, their boxes apart, on a noisy ground of another colour."""
    ground = random.uniform(0, 110, 3)
    picture = ground + random.normal(0, 8, (size, size, 1)) + random.normal(0, 20, 3) * np.linspace(-1, 1, size)[:, None, None]
    free = np.ones((size, size), bool)
    labels, masks = [], []
    wanted = random.integers(2, 5)
    for _ in range(50):
        image, label = digits.read(int(random.integers(len(digits))))
        side = int(random.integers(*SIDES))
        ink = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) / 255
        rows, columns = (np.flatnonzero((ink > INK).any(axis)) for axis in (1, 0))
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        top, left = (int(random.integers(0, size - length + 1)) for length in ink.shape)
        place = slice(top, top + ink.shape[0]), slice(left, left + ink.shape[1])
        if not free[place].all():
            continue
        free[place] = False
        colour = random.uniform(160, 255, 3)
        picture[place] += ink[..., None] * (colour - picture[place])
        mask = np.zeros((size, size), bool)
        mask[place] = ink > INK
        labels.append(label)
        masks.append(mask)
        if len(labels) == wanted:
            break
    return DigitScene(picture.clip(0, 255).astype(np.uint8), labels, masks)


def write_digit_scenes(root: str | Path, train: int = 1000, val: int = 100, size: int = 96, seed: int = 0,
                       progress: Callable[[str, int, int], None] = lambda split, done, scenes: None) -> None:
    """Writes under `root`, for the splits train and val, whose scenes share no digit:

        images/SPLIT/000000.png …            the pictures
        annotations/instances_SPLIT.json     COCO: boxes, masks as uncompressed run lengths, categories 0 to 9
        annotations/SPLIT/000000.png …       mmsegmentation: label maps, 0 the ground, 1 + digit its ink

    The scenes depend on the arguments alone. `progress` is called with the split, and how many of its scenes are done.

    Raises InputError for counts below 1, for a size in which no digit has room, and where nothing can be written.
    """
    if min(train, val) < 1 or size < SIDES[1]:
        raise InputError(f"{train} and {val} scenes of {size} pixels: there has to be one of each at least, of {SIDES[1]} pixels or more")
    root = Path(root)
    for number, (split, scenes) in enumerate((("train", train), ("val", val))):
        digits = DigitsDataset(split, transform={"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)})
        folders = root / "images" / split, root / "annotations" / split
        for folder in folders:
            make_folder(folder)
        coco = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)]}
        for index in range(scenes):
            scene = compose(digits, size, np.random.default_rng((seed, number, index)))
            name = f"{index:06d}.png"
            for folder, pixels in zip(folders, (scene.picture, scene.label_map), strict=True):
                with replacing(folder / name) as written:
                    Image.fromarray(pixels).save(written)
            coco["images"].append({"id": index, "file_name": name, "width": size, "height": size})
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                coco["annotations"].append({
                    "id": len(coco["annotations"]) + 1, "image_id": index, "category_id": label, "iscrowd": 0,
                    "area": int(mask.sum()), "bbox": box(mask), "segmentation": run_lengths(mask)})
            progress(split, index + 1, scenes)
        with replacing(root / "annotations" / f"instances_{split}.json") as written:
            written.write_text(json.dumps(coco))


def box(mask: np.ndarray) -> list[int]:
    """Left, top, width and height of what is set in `mask` (H, W)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of `mask` (H, W): column by column, beginning with how many are not set."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts[: None if counts[-1] else -1].tolist()}
