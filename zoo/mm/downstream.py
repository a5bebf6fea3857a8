"""Detectors and segmentors of mmdetection and mmsegmentation: what their checkpoints record, and how they are used without a config."""
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from zoo import checkpoints
from zoo.errors import InputError
from zoo.files import replacing
from zoo.mm.config import INSTALL, TOOLBOXES
from zoo.mm.networks import plain
from zoo.predict import contact_sheet, open_picture, output_files

READERS = ("LoadImageFromFile", "LoadAnnotations")  # what a picture that is already read does not need
PACKERS = {"mmdet": "PackDetInputs", "mmseg": "PackSegInputs"}
COLOURS = np.random.default_rng(3).integers(40, 256, (256, 3), dtype=np.uint8)  # of classes that bring none


@HOOKS.register_module()
class RecordSceneHook(Hook):
    """Adds to every checkpoint, as `zoo`, what it takes to use a detector or segmentor without its config: plain values only."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        dataset = runner.val_loop.dataloader.dataset
        steps = [step for step in runner.cfg.val_dataloader.dataset.pipeline if step.type not in (*READERS, *PACKERS.values())]
        checkpoint["zoo"] = {"task": runner.cfg.default_scope, "model": plain(runner.cfg.model), "steps": plain(steps),
                             "classes": list(dataset.metainfo["classes"]), "palette": plain(dataset.metainfo.get("palette"))}


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
        return [f"{names[label]}  {score:.1%}  at {', '.join(f'{edge:.0f}' for edge in box)}"
                for label, score, box in zip(self.labels, self.scores, self.boxes, strict=True)]


def load_scene_model(path: str | Path) -> tuple[nn.Module, SceneInfo]:
    """The detector or segmentor in a checkpoint of tools/train.py, in evaluation mode on the CPU, and what is known about it.

    Raises InputError for what `zoo.checkpoints.read` refuses, for another checkpoint, and without the toolbox.
    """
    checkpoint = checkpoints.read(path, allow=checkpoints.ENGINE_RECORDS)
    record = checkpoint.get("zoo") if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict) or record.get("task") not in checkpoints.TOOLBOX_TASKS:
        raise InputError(f"{path} is no detector or segmentor of tools/train.py")
    toolbox = record["task"]
    try:
        importlib.import_module(toolbox)
    except ImportError as error:
        raise InputError(f"{path} needs {TOOLBOXES[toolbox]}; {INSTALL}") from error
    with DefaultScope.overwrite_default_scope(toolbox):
        model = MODELS.build(ConfigDict(without_sync(record["model"])))
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise InputError(f"the weights in {path} do not fit: {error}") from error
    classes = tuple(record["classes"])
    palette = record["palette"]
    colours = np.asarray(palette, np.uint8) if palette else COLOURS[:len(classes)]
    return model.eval(), SceneInfo(toolbox, classes, colours, record["steps"])


def without_sync(value: object) -> object:
    """A config whose batch norms do not look at other processes."""
    if isinstance(value, dict):
        return {key: without_sync(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_sync, value))
    return "BN" if value == "SyncBN" else value


def prepare(info: SceneInfo, picture: Image.Image) -> dict:
    """The picture as the toolbox's `test_step` takes it: a batch of one."""
    pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB"))[..., ::-1])  # the toolboxes read pictures as BGR
    height, width = pixels.shape[:2]
    results = {"img": pixels, "img_shape": (height, width), "ori_shape": (height, width), "img_path": "", "img_id": 0}
    with DefaultScope.overwrite_default_scope(info.toolbox):
        keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        for step in [*info.steps, {"type": PACKERS[info.toolbox], "meta_keys": keys}]:
            results = TRANSFORMS.build(step)(results)
    return {"inputs": [results["inputs"]], "data_samples": [results["data_samples"]]}


def predict_scenes(model: nn.Module, info: SceneInfo, paths: Iterable[str | Path], *, threshold: float = 0.3,
                   progress: Callable[[int], None] = lambda done: None) -> list[Scene]:
    """What is in each picture; of instances, those with a score of at least `threshold`."""
    if not 0 <= threshold <= 1:
        raise InputError(f"the threshold {threshold} is not between 0 and 1")
    scenes = []
    for path in map(Path, paths):
        with torch.inference_mode():
            sample = model.test_step(prepare(info, open_picture(path)))[0]
        if info.toolbox == "mmseg":
            scenes.append(Scene(path, classes=sample.pred_sem_seg.data[0].cpu().numpy()))
        else:
            found = sample.pred_instances
            found = found[found.scores >= threshold]
            found = found[found.scores.argsort(descending=True)].cpu().numpy()
            scenes.append(Scene(path, found.labels, found.scores, found.bboxes, found.get("masks")))
        progress(len(scenes))
    return scenes


def draw(scene: Scene, info: SceneInfo) -> Image.Image:
    """The picture with what was found: coloured masks, boxes with class and score, or a segmentation map half transparent."""
    picture = open_picture(scene.path)
    pixels = np.asarray(picture).astype(np.float32)
    if scene.classes is not None:
        return Image.fromarray(((pixels + info.colours[scene.classes]) / 2).astype(np.uint8))
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
    """Draws the scenes into the files that `zoo.predict.output_files` names, several in one file side by side; their paths."""
    targets = output_files([scene.path for scene in scenes], output)
    drawn = [draw(scene, info) for scene in scenes]
    if len(targets) < len(drawn):
        drawn = [contact_sheet(drawn)]
    if targets[0] != Path(output):
        Path(output).mkdir(exist_ok=True)
    for target, picture in zip(targets, drawn, strict=True):
        with replacing(target) as written:
            picture.save(written)
    return targets
