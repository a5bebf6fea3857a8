"""Detectors and segmentors of mmdetection and mmsegmentation: what their checkpoints record, and how they are used without a config."""
import contextlib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS, TASK_UTILS, TRANSFORMS, DefaultScope, registry
from mmengine.runner import Runner
from PIL import Image
from torch import Tensor, nn

from zoo import checkpoints
from zoo.errors import InputError
from zoo.mm import toolbox_operators  # noqa: F401  whose norm checkpoints may name
from zoo.mm.config import import_toolbox
from zoo.mm.networks import plain
from zoo.predicting.answers import Failed, stop
from zoo.predicting.scenes import COLOURS, Scene, SceneInfo, readable_pictures
from zoo.toolboxes import INSTALL, TOOLBOXES

READERS = ("LoadImageFromFile", "LoadAnnotations", "LoadPicture", "LoadLabels")  # what a picture that is already read does not need
PACKERS = {"mmdet": "PackDetInputs", "mmseg": "PackSegInputs"}
# Keys that say which weights training started from. Those of a checkpoint take their place, so that loading it reads no other file.
SOURCES = (*checkpoints.SOURCES, "weights", "init_cfg", "checkpoint", "teacher_ckpt")
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
    "category_ids": (lambda value: isinstance(value, list | tuple) and all(isinstance(number, int) for number in value),
                     "a list of whole numbers"),
}


@HOOKS.register_module()
class RecordSceneHook(Hook):
    """Adds to every checkpoint, as `zoo`, what it takes to use a detector or segmentor without its config: plain values only."""

    def before_train(self, runner: Runner) -> None:
        if not (runner.cfg.get("val_dataloader") or runner.cfg.get("test_dataloader")):
            raise InputError("the config has neither a val_dataloader nor a test_dataloader, whose pipeline says how pictures are used")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        dataset = cast(Any, runner.val_loop or runner.train_loop).dataloader.dataset
        held_out = runner.cfg.get("val_dataloader") or runner.cfg.test_dataloader
        steps = [step for step in held_out.dataset.pipeline if step.type not in (*READERS, *PACKERS.values())]
        checkpoint["zoo"] = {"task": runner.cfg.default_scope, "model": plain(runner.cfg.model), "steps": plain(steps),
                             "classes": list(dataset.metainfo["classes"]), "palette": plain(dataset.metainfo.get("palette")),
                             "category_ids": getattr(dataset, "cat_ids", None)}


def load_scene_model(checkpoint: str | Path | checkpoints.Opened) -> tuple[nn.Module, SceneInfo]:
    """The detector or segmentor in a checkpoint of `zoo train`, in evaluation mode on the CPU, and what is known about it.

    Raises InputError for what `zoo.checkpoints.read` refuses, for another checkpoint, and without the toolbox.
    """
    checkpoint = checkpoints.opened(checkpoint)
    path, record = checkpoint.path, checkpoint.record
    if record is None or checkpoint.task not in checkpoints.TOOLBOX_TASKS:
        raise InputError(f"{path} is no detector or segmentor of `zoo train`")
    toolbox = record["task"]
    try:
        import_toolbox(toolbox)
    except ImportError as error:
        raise InputError(f"{path} needs {TOOLBOXES[toolbox]}; {INSTALL}") from error
    if not isinstance(state := cast(dict, checkpoint.content).get("state_dict"), dict):
        raise InputError(f"{path} is no detector or segmentor of `zoo train`: it holds no 'state_dict'")
    checkpoints.check_numbers(path, state)
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
    except RuntimeError as error:  # which lists all that differ
        given = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        differing = checkpoints.differences(model.state_dict(), given)
        raise InputError(f"the weights in {path} do not fit: {differing or checkpoints.one_line(error)}") from error
    classes, palette = tuple(map(str, record["classes"])), record.get("palette")
    colours = np.asarray(palette, np.uint8) if palette else np.resize(COLOURS, (len(classes), 3))
    ids = tuple(record.get("category_ids") or range(1, len(classes) + 1))
    if len(ids) != len(classes):
        raise InputError(f"{path} records {len(ids)} category_ids for {len(classes)} classes")
    return model.eval(), SceneInfo(toolbox, classes, colours, steps, ids)


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
                   failed: Failed = stop) -> Iterator[Scene]:
    """What is in each picture, one after the other; of instances, those with a score of at least `threshold`.

    What `failed` is called with, the path of a picture that cannot be read and why, is left out.
    """
    for path, picture in readable_pictures(paths, threshold, failed):
        with torch.inference_mode():
            sample = cast(BaseModel, model).test_step(prepare(info, picture))[0]
        if info.toolbox == "mmseg":
            yield Scene(path, classes=sample.pred_sem_seg.data[0].cpu().numpy())
        else:
            found = sample.pred_instances
            found = found[found.scores >= threshold]
            found = found[found.scores.argsort(descending=True)].cpu().numpy()
            yield Scene(path, found.labels, found.scores, found.bboxes, found.get("masks"))
