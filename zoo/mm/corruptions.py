"""Checkpoints under the corruptions of ImageNet-C: as a transform of data, and all of them at all severities.

ImageNet-C's own folders are read where the user has them.
"""
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from mmengine.registry import TRANSFORMS
from PIL import Image

from zoo.errors import InputError
from zoo.measuring.robustness import Robustness
from zoo.mm.config import load_config
from zoo.mm.training import evaluate_each
from zoo.reading.corruptions import CORRUPTIONS, SEVERITIES, check_corruption, check_library, corrupt

SCORES = {"accuracy/top1": 1, "iou/mean": 1, "dice/mean": 1, "mIoU": 1, "coco/bbox_mAP": 100}  # and what makes them per cent


@TRANSFORMS.register_module()
class CorruptImage:
    """Corrupts an image as ImageNet-C does.

    Called with a PIL image it returns one of the same size and mode; with the dict of a toolbox's pipeline, which holds a
    uint8 array (H, W, 3) of blue, green and red as "img", it replaces that. What is random is drawn from NumPy's global generator.

    Args:
        name: one of `zoo.reading.corruptions.CORRUPTIONS`.
        severity: 1 to 5.

    Raises InputError for another name or severity, and when called for an image of fewer than 32 pixels on a side.
    """

    def __init__(self, name: str, severity: int):
        check_corruption(name, severity)
        check_library()  # is missed now, not in a worker process
        self.name, self.severity = name, severity

    def __call__(self, given: Image.Image | dict) -> Image.Image | dict:
        if isinstance(given, dict):
            return {**given, "img": np.ascontiguousarray(self._corrupt(given["img"][..., ::-1])[..., ::-1])}
        return Image.fromarray(self._corrupt(np.asarray(given.convert("RGB")))).convert(given.mode)

    def _corrupt(self, pixels: np.ndarray) -> np.ndarray:
        return corrupt(pixels, self.name, self.severity)


def evaluate_corruptions(config: str | Path, checkpoint: str | Path, *, folder: str | Path | None = None, launcher: str | None = None,
                         cfg_options: Sequence[str] = (), progress: Callable[[str], None] = lambda step: None) -> Robustness:
    """The errors of a checkpoint on the test data of its config, corrupted in every way; arguments and errors as in `zoo.mm.evaluate`.

    An error is 100 minus the score in per cent: of classifiers the top-1 accuracy, of segmentors the mean IoU or Dice, of detectors
    COCO's mAP of boxes. `folder` is ImageNet-C, with folders CORRUPTION/SEVERITY/CLASS; without one, images are corrupted after
    timm's resizing and cropping (ImageNet-C's order), pictures with masks as they are, and where the dataset has a pipeline as its
    first step after loading.

    Also raises InputError for data that is no pictures, and for another metric.
    """
    check_corruptible(config, cfg_options, folder)
    points = list(itertools.product(CORRUPTIONS, SEVERITIES))
    changes = itertools.chain([()], (_options(config, cfg_options, name, severity, folder) for name, severity in points))
    quiet = "log_level=WARNING"  # what the engine says of itself, 76 times
    found = map(_error, evaluate_each(config, checkpoint, changes, launcher=launcher, cfg_options=[quiet, *cfg_options]))

    progress(f"1/{len(points) + 1} clean")
    clean, errors = next(found), {name: [] for name in CORRUPTIONS}
    for (number, (name, severity)), error in zip(enumerate(points, 2), found, strict=True):
        errors[name].append(error)
        progress(f"{number}/{len(points) + 1} {name}, severity {severity}: error {errors[name][-1]:.2f} %")
    return Robustness(clean, errors)


def check_corruptible(config: str | Path, cfg_options: Sequence[str] = (), folder: str | Path | None = None) -> None:
    """Raises InputError if `evaluate_corruptions` could not read, or corrupt, the test data of the config."""
    data = load_config(config, cfg_options).test_dataloader.dataset.type
    if folder is None:
        check_library()
    elif data != "ImageFolderDataset":
        raise InputError(f"ImageNet-C is read in the place of image folders, and the test data of {config} are of {data}")
    else:
        _check_folder(Path(folder))
    try:
        load_config(config, [*cfg_options, *_options(config, cfg_options, CORRUPTIONS[0], SEVERITIES[0], folder)])
    except InputError as error:
        raise InputError(f"the test data of {config}, of {data}, cannot be corrupted: {error}") from error


def _error(metrics: Mapping[str, float]) -> float:
    if not metrics:  # of a detector that finds nothing at all
        return 100.0
    score = next((name for name in SCORES if name in metrics), None)
    if score is None:
        raise InputError(f"errors are of one of {', '.join(SCORES)}, and the config measures {', '.join(metrics)}")
    return float(100 - SCORES[score] * metrics[score])  # mmsegmentation's are NumPy's


def _options(config: str | Path, cfg_options: Sequence[str], name: str, severity: int, folder: str | Path | None) -> list[str]:
    """The changes to the config that let it read corrupted images."""
    place = "test_dataloader.dataset"
    if folder is not None:  # whose images are cropped already
        return [f"{place}.root={str(folder)!r}", f"{place}.split={name}/{severity}", f"{place}.transform.crop_pct=1.0"]
    corruption = {"name": name, "severity": severity}
    pipeline = load_config(config, cfg_options).test_dataloader.dataset.get("pipeline")
    if pipeline is None:
        return [f"{place}.corruption={corruption}"]
    return [f"{place}.pipeline={[dict(pipeline[0]), {'type': 'CorruptImage', **corruption}, *map(dict, pipeline[1:])]}"]


def _check_folder(folder: Path) -> None:
    for name, severity in itertools.product(CORRUPTIONS, SEVERITIES):
        if not (folder / name / str(severity)).is_dir():
            raise InputError(f"{folder} is not ImageNet-C: it has no folder {name}/{severity}")
