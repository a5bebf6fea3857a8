"""Detectors and segmentors of mmdetection and mmsegmentation: what their checkpoints record, and how they are used without a config."""
import contextlib
import importlib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS, TASK_UTILS, TRANSFORMS, DefaultScope, registry
from mmengine.runner import Runner
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from zoo import checkpoints
from zoo.errors import InputError
from zoo.files import replacing
from zoo.mm.config import INSTALL, TOOLBOXES
from zoo.mm.networks import plain
from zoo.predicting.sheets import contact_sheet, output_files
from zoo.reading.pictures import open_picture

READERS = ("LoadImageFromFile", "LoadAnnotations")  # what a picture that is already read does not need
PACKERS = {"mmdet": "PackDetInputs", "mmseg": "PackSegInputs"}
# Keys that say which weights training started from. Those of a checkpoint take their place, so that loading it reads no other file.
SOURCES = (*checkpoints.SOURCES, "init_cfg", "checkpoint", "teacher_ckpt")
# What the toolboxes name by `type` without registering it: operators of mmcv, and words that one of their classes tells apart.
UNREGISTERED = frozenset((
    "nms", "soft_nms", "RoIAlign", "RoIPool", "SimpleRoIAlign", "DeformRoIPoolPack", "ModulatedDeformRoIPoolPack",
    "conv", "interpolation_conv", "last_conv", "dilation", "offset",
))
# A file, an address, a name to import or a call: the toolboxes import, open, download and even `eval` texts of their arguments.
FOREIGN = re.compile(r"[/\\:()~]|\.[^\W\d]")
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, dict), "a dict of parts"),
    "steps": (lambda value: isinstance(value, list | tuple) and all(isinstance(step, dict) for step in value), "a list of dicts"),
    "classes": (checkpoints.are_names, "a list of names"),
    "palette": (lambda value: isinstance(value, list | tuple) and all(_is_colour(colour) for colour in value),
                "a list of colours, each 3 whole numbers from 0 to 255,"),
}
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
    checkpoint = checkpoints.read(path)
    record = checkpoint.get("zoo") if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict) or record.get("task") not in checkpoints.TOOLBOX_TASKS:
        raise InputError(f"{path} is no detector or segmentor of tools/train.py")
    toolbox = record["task"]
    try:
        importlib.import_module(toolbox)
    except ImportError as error:
        raise InputError(f"{path} needs {TOOLBOXES[toolbox]}; {INSTALL}") from error
    if not isinstance(state := checkpoint.get("state_dict"), dict):
        raise InputError(f"{path} is no detector or segmentor of tools/train.py: it holds no 'state_dict'")
    checkpoints.check_record(path, record, FIELDS, needed=("model", "steps", "classes"))
    parts, steps = (checkpoints.without(plain(record[key]), SOURCES) for key in ("model", "steps"))
    check_parts(path, toolbox, [parts, *steps])
    try:
        with registered_only(toolbox):
            model = MODELS.build(ConfigDict(without_sync(parts)))
    except Exception as error:  # every part stumbles in its own way over an argument out of place
        raise InputError(f"{path} records a model that {toolbox} cannot build: {checkpoints.one_line(error)}") from error
    if not isinstance(model, BaseModel):
        raise InputError(f"{path} records a {type(model).__name__}, which is neither a detector nor a segmentor")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights in {path} do not fit: {error}") from error
    classes, palette = tuple(map(str, record["classes"])), record.get("palette")
    colours = np.asarray(palette, np.uint8) if palette else COLOURS[:len(classes)]
    return model.eval(), SceneInfo(toolbox, classes, colours, steps)


def check_parts(path: str | Path, toolbox: str, value: object, key: str = "") -> None:
    """Raises InputError unless building what the checkpoint at `path` records takes parts of the toolbox only.

    The engine's registries import and call whatever a `type` names, and parts of the toolboxes read files, download, and
    evaluate texts. So every `type`, at any depth, has to be a registered name, of another toolbox only with its scope before it,
    and no other text may name a file, an address, an object to import, or a call.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "type":
                _check_type(path, toolbox, item)
            elif name == "_scope_" and item != toolbox:
                raise InputError(f"{path} would import {item!r} on loading and is refused: only parts of {toolbox} are built")
            else:
                check_parts(path, toolbox, item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            check_parts(path, toolbox, item, key)
    elif isinstance(value, str):
        # timm's names have dots before what their weights were trained on; which is not read
        text = value.replace(".", "") if key in ("name", "model_name") else value
        if FOREIGN.search(text):
            raise InputError(f"{path} would open, download or run {reprlib.repr(value)} on loading and is refused: it is the value "
                             f"of {key!r}, where plain words are needed")
    elif value is not None and not isinstance(value, bool | int | float):
        raise InputError(f"{path} records a {type(value).__name__} as {key!r}, where text, numbers, lists and dicts are needed")


def _check_type(path: str | Path, toolbox: str, name: object) -> None:
    if isinstance(name, str):
        scope, dot, part = name.rpartition(".")
        if part in _registered(scope) if scope in checkpoints.TOOLBOX_TASKS else not dot and (
                name in UNREGISTERED or name in _registered("mmengine") or name in _registered(toolbox)):
            return
    raise InputError(f"{path} would run {reprlib.repr(name)} on loading and is refused: {toolbox} has no such part")


def _registered(scope: str) -> set[str]:
    """The names of the models, their parts and the transforms of a toolbox or the engine."""
    names: set[str] = set()
    for kind in (MODELS, TASK_UTILS, TRANSFORMS):
        with kind.switch_scope_and_registry(scope) as found:
            found.import_from_location()
            names |= found.module_dict.keys()
    return names


@contextlib.contextmanager
def registered_only(toolbox: str) -> Iterator[None]:
    """Inside, registries look names up in the toolbox first, and import none that is not registered."""
    fallback = registry.get_object_from_string
    registry.get_object_from_string = lambda name: None
    try:
        with DefaultScope.overwrite_default_scope(toolbox):
            yield
    finally:
        registry.get_object_from_string = fallback


def _is_colour(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(part, int) and 0 <= part <= 255 for part in value)


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
    with registered_only(info.toolbox):
        keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        for step in [*info.steps, {"type": PACKERS[info.toolbox], "meta_keys": keys}]:
            try:
                transform = TRANSFORMS.build(step)
            except Exception as error:  # as for parts of models
                raise InputError(f"the recorded step {step.get('type')!r} cannot be built: {checkpoints.one_line(error)}") from error
            results = transform(results)
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
    """Draws the scenes into the files that `zoo.predicting.sheets.output_files` names, several in one file side by side; their paths."""
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
