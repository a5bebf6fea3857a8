"""What detectors and segmentors find in pictures: described in text and drawn."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zoo.files import make_folder, replacing
from zoo.predicting.sheets import contact_sheet, output_files
from zoo.reading.pictures import open_picture

COLOURS = np.random.default_rng(3).integers(40, 256, (256, 3), dtype=np.uint8)  # of classes that bring none


@dataclass(frozen=True)
class SceneInfo:
    """What is known about a trained detector or segmentor: its toolbox, the names and colours of its classes, and the
    steps of the toolbox's pipeline that a picture goes through."""

    toolbox: str
    classes: tuple[str, ...]
    colours: np.ndarray
    steps: list[dict]


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
    pixels = np.asarray(picture).astype(np.float32)
    if scene.classes is not None:
        return Image.fromarray(((pixels + info.colours[scene.classes]) / 2).astype(np.uint8))
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


def write_scenes(scenes: list[Scene], info: SceneInfo, output: str | Path) -> list[Path]:
    """Draws the scenes into the files that `zoo.predicting.sheets.output_files` names, several in one file side by side; their paths."""
    targets = output_files([scene.path for scene in scenes], output)
    drawn = [draw(scene, info) for scene in scenes]
    if len(targets) < len(drawn):
        drawn = [contact_sheet(drawn)]
    if targets[0] != Path(output):
        make_folder(output)
    for target, picture in zip(targets, drawn, strict=True):
        with replacing(target) as written:
            picture.save(written)
    return targets
