"""Robustness: the fifteen corruptions of ImageNet-C (arXiv 1903.12261) at five severities, and what they cost a model.

The corruptions are those of the package imagecorruptions, which takes images of any size from 32 pixels on; for small images its
severities, made for 224 pixels, are harsher than they look. ImageNet-C's own folders are read where the user has them.
"""
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from mmengine.registry import TRANSFORMS
from PIL import Image

from zoo.errors import InputError, near_misses, require
from zoo.files import make_folder, replacing
from zoo.mm.config import load_config
from zoo.mm.training import evaluate_each

# Per corruption, AlexNet's error in per cent on ImageNet-C, the mean over severities: what the paper divides by. Six digits of them
# are in the code of AugMix (google-research/augmix, imagenet.py), which takes them from the paper's (hendrycks/robustness).
ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880, "glass_blur": 82.6268,
    "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
}
CORRUPTIONS = tuple(ALEXNET)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # pixels on a side
SCORES = {"accuracy/top1": 1, "iou/mean": 1, "dice/mean": 1, "mIoU": 1, "coco/bbox_mAP": 100}  # and what makes them per cent
SEEDED = ("impulse_noise", "glass_blur")  # have generators of their own; the others draw from NumPy's global one


@TRANSFORMS.register_module()
class CorruptImage:
    """Corrupts an image as ImageNet-C does.

    Called with a PIL image it returns one of the same size and mode; with the dict of a toolbox's pipeline, which holds a
    uint8 array (H, W, 3) of blue, green and red as "img", it replaces that. What is random is drawn from NumPy's global generator.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.

    Raises InputError for another name or severity, and when called for an image of fewer than 32 pixels on a side.
    """

    def __init__(self, name: str, severity: int):
        if name not in CORRUPTIONS:
            raise InputError(f"unknown corruption {name!r}{near_misses(name, CORRUPTIONS) or '; known are ' + ', '.join(CORRUPTIONS)}")
        if severity not in SEVERITIES:
            raise InputError(f"severity={severity}: it is 1 to 5")
        self.name, self.severity = name, severity
        _library()  # is missed now, not in a worker process

    def __call__(self, given: Image.Image | dict) -> Image.Image | dict:
        if isinstance(given, dict):
            return {**given, "img": np.ascontiguousarray(self._corrupt(given["img"][..., ::-1])[..., ::-1])}
        return Image.fromarray(self._corrupt(np.asarray(given.convert("RGB")))).convert(given.mode)

    def _corrupt(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        if min(height, width) < SMALLEST:
            raise InputError(f"a {height}x{width} image cannot be corrupted: {SMALLEST} pixels on a side are needed")
        seed = {"seed": np.random.randint(2**31)} if self.name in SEEDED else {}
        return _library().corrupt(pixels, corruption_name=self.name, severity=self.severity, **seed)


def _library():
    require("corrupting", "robustness", "imagecorruptions")
    import imagecorruptions
    return imagecorruptions


@dataclass(frozen=True)
class Robustness:
    """Errors in per cent: of clean images, and by corruption at severities 1 to 5."""

    clean: float
    errors: Mapping[str, Sequence[float]]

    @property
    def mean_error(self) -> float:
        """The mean over corruptions and severities."""
        return float(np.mean(list(self.errors.values())))

    def mean_corruption_error(self, baseline: Mapping[str, float]) -> float:
        """mCE in per cent: the mean over corruptions of Σ_s error_s / Σ_s error_s of the baseline, given as means over severities."""
        return float(np.mean([100 * np.mean(errors) / baseline[name] for name, errors in self.errors.items()]))


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
        _library()
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


def read_baseline(path: str | Path) -> dict[str, float]:
    """A baseline's errors, means over severities, from what `write_report` wrote."""
    try:
        return {name: float(np.mean(errors)) for name, errors in json.loads(Path(path).read_text())["errors"].items()}
    except OSError as error:
        raise InputError(f"cannot read the baseline {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a corruptions.json of `zoo test`: {error}") from error


def check_baseline(baseline: Mapping[str, float]) -> None:
    """Raises InputError unless there is an error above zero for every corruption."""
    for name in CORRUPTIONS:
        if not baseline.get(name, 0) > 0:
            raise InputError(f"the baseline has no error for {name}; a mean corruption error cannot be relative to it")


def write_report(found: Robustness, folder: str | Path, baseline: Mapping[str, float] | None) -> list[Path]:
    """Writes `folder`/corruptions.json and the curves, corruptions.png; the baseline's means are dashed lines in them."""
    folder = Path(folder)
    make_folder(folder)
    numbers, curves = folder / "corruptions.json", folder / "corruptions.png"
    with replacing(numbers) as written:
        written.write_text(json.dumps(asdict(found), indent=1) + "\n")
    with replacing(curves) as written:
        _draw(found, baseline).savefig(written, dpi=120)
    return [numbers, curves]


def _draw(found: Robustness, baseline: Mapping[str, float] | None):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(3, 5, sharex=True, sharey=True)
    for place, (name, errors) in zip(axes.flat, found.errors.items(), strict=True):
        place.axhline(found.clean, color="grey", linewidth=0.8)
        if baseline is not None:
            place.axhline(baseline[name], color="tab:orange", linestyle="--", linewidth=1)
        place.plot(SEVERITIES, errors, marker="o", markersize=3)
        place.set_title(name.replace("_", " "), fontsize=9)
    axes[0, 0].set(ylim=(0, 100), xticks=SEVERITIES)
    figure.supxlabel("severity")
    figure.supylabel("error, %   (grey: clean" + (", dashed: baseline, mean over severities)" if baseline is not None else ")"))
    return figure
