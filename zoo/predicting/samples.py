"""A sheet of samples of somebody's data with what is known about them, on which wrong labels can be seen."""
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw

from zoo.predicting.fixations import heat
from zoo.predicting.scenes import COLOURS
from zoo.predicting.sheets import TILE, annotate, contact_sheet
from zoo.reading.annotations import compressed
from zoo.reading.fixations import read_map
from zoo.reading.own_data import OwnData, Sample, mask_labels
from zoo.reading.pictures import open_picture
from zoo.reading.volumes import open_volume

SHOWN = 25
LINES = 4  # of text below a picture


def sample_sheet(data: OwnData, shown: int = SHOWN) -> Image.Image:
    """Samples to train on, of every class in turn: pictures with their class, their mask or their boxes; of volumes one slice."""
    return contact_sheet([_tile(data, sample) for sample in itertools.islice(_in_turn(data), shown)])


def _in_turn(data: OwnData) -> Iterator[Sample]:
    """Each of the samples that show a class once: the first of every class, then the second, …"""
    of_class: list[list[Sample]] = [[] for _ in data.classes]
    for sample in data.splits["train"]:
        for label in set(sample.labels):
            of_class[label].append(sample)
    met: set[Path] = set()
    for sample in itertools.chain.from_iterable(itertools.zip_longest(*of_class)):
        if sample is not None and sample.path not in met:
            met.add(sample.path)
            yield sample


def _tile(data: OwnData, sample: Sample) -> Image.Image:
    if data.task == "fixations":
        return _looked_at(sample)
    there = sorted(set(sample.labels) - ({0} if sample.mask else set()))
    names = [data.classes[label] for label in there[:LINES]] + ([f"and {len(there) - LINES} more"] if len(there) > LINES else [])
    colours = [_colour(label) if data.task != "classes" else (0, 0, 0) for label in there[:LINES]]
    picture = _slice(data, sample) if data.task == "volumes" else open_picture(sample.path)
    if data.task == "masks":
        picture = _covered(picture, mask_labels(data, sample), COLOURS)
    elif data.outlined:
        picture = _covered(picture, _instances(sample), np.insert(COLOURS[:len(data.classes)], 0, 0, 0))
    whole = picture.size
    picture.thumbnail((TILE, TILE))
    if data.task == "boxes":
        _draw_boxes(picture, sample, picture.width / whole[0])
    return annotate(picture, [*names, sample.path.name[-24:]], [*colours, *[(128, 128, 128)] * (len(names) - len(colours) + 1)])


def _looked_at(sample: Sample) -> Image.Image:
    picture = open_picture(sample.path)
    picture = heat(picture, np.asarray(read_map(cast(Path, sample.mask), sample.path, picture.size)))
    picture.thumbnail((TILE, TILE))
    return annotate(picture, [sample.path.name[-24:]], [(128, 128, 128)])


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = map(int, COLOURS[label % len(COLOURS)])
    return red, green, blue


def _covered(picture: Image.Image, labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """`picture` half covered by the colours of all labels but 0."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    mixed = np.where((labels > 0)[..., None], (pixels + colours[labels % len(colours)]) / 2, pixels)
    return Image.fromarray(mixed.astype(np.uint8))


def _instances(sample: Sample) -> np.ndarray:
    """(H, W): 0, or in the masks of instances 1 + their class."""
    from pycocotools import mask as masks

    labels = np.zeros(sample.size[::-1], np.int64)
    for box in sample.boxes:
        labels[masks.decode(compressed(box["segmentation"], *sample.size)).astype(bool)] = 1 + box["category_id"]
    return labels


def _slice(data: OwnData, sample: Sample) -> Image.Image:
    """The slice across the last axis that shows most of the classes but the first, of the first channel."""
    voxels, labels = (np.asanyarray(open_volume(path, channels).dataobj).astype(kind)
                      for path, channels, kind in ((sample.path, data.channels, np.float32), (cast(Path, sample.mask), 1, np.int64)))
    place = int((labels > 0).sum((0, 1)).argmax())
    shown = voxels[:, :, place].reshape(*labels.shape[:2], -1)[..., 0]
    low, high = np.percentile(shown, (1, 99))
    grey = Image.fromarray((np.clip((shown - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8))
    return _covered(grey, labels[:, :, place], COLOURS).transpose(Image.Transpose.ROTATE_90)


def _draw_boxes(picture: Image.Image, sample: Sample, scale: float) -> None:
    pen = ImageDraw.Draw(picture)
    for box in sample.boxes:
        colour = _colour(box["category_id"])
        left, top, width, height = box["bbox"]
        pen.rectangle([edge * scale for edge in (left, top, left + width, top + height)], outline=colour)
