"""What detectors and segmentors of the toolboxes find in pictures: described in text, drawn, and in COCO's form."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zoo.errors import InputError
from zoo.predicting.answers import Answers, Failed
from zoo.predicting.label_maps import Labelled, LabelMaps, overlay
from zoo.reading.coco import compressed_run_lengths
from zoo.reading.pictures import open_picture

COLOURS = np.random.default_rng(3).integers(40, 256, (256, 3), dtype=np.uint8)  # of classes that bring none


def readable_pictures(paths: Iterable[str | Path], threshold: float, failed: Failed) -> Iterator[tuple[Path, Image.Image]]:
    """Each path with its picture; `failed` is called with the others. Raises InputError for a threshold of scores that is none."""
    if not 0 <= threshold <= 1:
        raise InputError(f"the threshold {threshold:g} is not between 0 and 1")
    for path in map(Path, paths):
        try:
            picture = open_picture(path)
        except InputError as error:
            failed(path, error)
            continue
        yield path, picture


@dataclass(frozen=True)
class SceneInfo:
    """What is known about a trained detector or segmentor: its toolbox, the names and colours of its classes, the steps of the
    toolbox's pipeline that a picture goes through, and the numbers that the classes have in COCO's annotations."""

    toolbox: str
    classes: tuple[str, ...]
    colours: np.ndarray
    steps: list[dict]
    category_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """What was found in the picture at `path`.

    By a detector, instances with the best score first: `labels` (N,) class indices, `scores` (N,), `boxes` (N, 4) as left,
    top, right, bottom in pixels, and `masks` (N, H, W) bool, or None where the detector gives none. By a segmentor, a map
    `classes` (H, W) of class indices; the others are then None.
    """

    path: Path
    labels: np.ndarray | None = None
    scores: np.ndarray | None = None
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None
    classes: np.ndarray | None = None

    def described(self, names: tuple[str, ...]) -> list[str]:
        """Lines of text: an instance each, or a class and its share of the picture."""
        if self.classes is not None:
            shares = np.bincount(self.classes.ravel(), minlength=len(names)) / self.classes.size
            return [f"{name}  {share:.1%}" for name, share in zip(names, shares, strict=True) if share]
        assert self.labels is not None and self.scores is not None and self.boxes is not None  # without a map there are instances
        return [f"{names[label]}  {score:.1%}  at {', '.join(f'{edge:.0f}' for edge in box)}"
                for label, score, box in zip(self.labels, self.scores, self.boxes, strict=True)]


def draw(scene: Scene, info: SceneInfo) -> Image.Image:
    """The picture with what was found: coloured masks, boxes with class and score, or a segmentation map half transparent."""
    picture = open_picture(scene.path)
    if scene.classes is not None:
        return overlay(picture, scene.classes, info.colours)
    pixels = np.asarray(picture).astype(np.float32)
    assert scene.labels is not None and scene.scores is not None and scene.boxes is not None  # without a map there are instances
    for mask, label in zip(() if scene.masks is None else scene.masks, scene.labels, strict=False):
        pixels[mask] = (pixels[mask] + info.colours[label]) / 2
    picture = Image.fromarray(pixels.astype(np.uint8))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, picture.height // 40))
    for box, label, score in zip(scene.boxes, scene.labels, scene.scores, strict=True):
        colour = tuple(map(int, info.colours[label]))
        pen.rectangle(box.tolist(), outline=colour)
        pen.text((box[0] + 2, box[1]), f"{info.classes[label]} {score:.0%}", fill=colour, font=font)
    return picture


class FoundAnswers(Answers):
    """What a detector found: a table of boxes, COCO's results in JSON, drawings, or a contact sheet of these.

    JSON is what `pycocotools.coco.COCO.loadRes` reads: for every instance `image_id`, which numbers the inputs from 1, `category_id`,
    `bbox` as left, top, width and height in pixels, `score` and, where the detector gives masks, `segmentation`, compressed run
    lengths; and `file_name` and `category_name` beside them.
    """

    columns = ("picture", "image_id", "category_id", "class", "score", "left", "top", "width", "height")
    table = "answers.json"

    def __init__(self, inputs: Sequence[Path], output: str | Path, info: SceneInfo):
        super().__init__(inputs, output)
        self.info, self.ids = info, {path: i for i, path in enumerate(inputs, 1)}

    def records(self, answer: Scene) -> list[dict]:
        assert answer.labels is not None and answer.scores is not None and answer.boxes is not None
        found = []
        for i, (label, score, box) in enumerate(zip(answer.labels.tolist(), answer.scores.tolist(), answer.boxes.tolist(), strict=True)):
            left, top, right, bottom = box
            record = {"image_id": self.ids[answer.path], "file_name": str(answer.path), "category_id": self.info.category_ids[label],
                      "category_name": self.info.classes[label], "score": round(score, 6),
                      "bbox": [round(edge, 3) for edge in (left, top, right - left, bottom - top)]}
            if answer.masks is not None:
                record["segmentation"] = compressed_run_lengths(answer.masks[i])
            found.append(record)
        return found

    def flat(self, answer: Scene) -> list[dict]:
        return [dict(zip(self.columns, (record["file_name"], record["image_id"], record["category_id"], record["category_name"],
                                        record["score"], *record["bbox"]), strict=True)) for record in self.records(answer)]

    def save(self, answer: Scene, ending: str, path: Path) -> None:
        draw(answer, self.info).save(path)

    def tile(self, answer: Scene) -> Image.Image:
        return draw(answer, self.info)


class SceneMaps(LabelMaps):
    """The label maps of a segmentor of mmsegmentation, and overlays in the colours of its classes."""

    def __init__(self, inputs: Sequence[Path], output: str | Path, info: SceneInfo):
        super().__init__(inputs, output, info.colours)
        self.info = info

    def add(self, answer: Scene) -> None:
        assert answer.classes is not None
        super().add(Labelled(answer.path, answer.classes, self.info.classes))


def scene_answers(inputs: Sequence[Path], output: str | Path, info: SceneInfo) -> Answers:
    """What writes the scenes that are found. Raises InputError as `Answers` does."""
    return (SceneMaps if info.toolbox == "mmseg" else FoundAnswers)(inputs, output, info)
