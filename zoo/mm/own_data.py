"""Training on somebody's own data without a config: the config that suits the data, the machine and what is asked for."""
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
from mmengine.config import Config

import zoo.models  # noqa: F401  registers them
from zoo.errors import InputError, near_misses
from zoo.files import make_folder
from zoo.predicting.samples import sample_sheet
from zoo.reading.own_data import OwnData, Task, picture_sizes, write_samples

FITTING = {
    "classes": "a classifier, such as biformer_nano or resnet18",
    "masks": "a U-Net in 2-D, such as attention_unet_nano, or the backbone of one, such as biformer_nano",
    "boxes": "the backbone of a detector, such as biformer_nano",
    "volumes": "a U-Net in 3-D, such as attention_unet3d_nano",
}
# What mirror images of may be another class: digits, letters and sides, by their names.
HANDED = re.compile(r"\d+|\w|(.*\b|.*_)(left|right|l|r|lh|rh|text|digit|letter)(\b.*|_.*)", re.IGNORECASE)
STEPS = 1000  # of a training by default, if there are epochs enough
EPOCHS = (30, 200)  # fewest and most by default
FINE_STEPS, FINE_EPOCHS = 400, (10, 60)  # of weights that have been trained before
RATE, FINE_RATE = 1e-3, 2e-4  # for 32 samples at once; it goes with the root of their number
AVERAGED = 0.1  # share of the steps that the average of the weights looks back on
WARMING = 0.1  # share of the epochs in which the rate rises
STRIDE = 32  # pixels that sizes are multiples of


@dataclass(frozen=True)
class Wishes:
    """What is asked for in the place of what suits the data; None for that.

    `weights` is a file, `pretrained` says to take what timm downloads; `freeze` trains what is new alone.
    """

    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    size: int | None = None
    weights: str | None = None
    pretrained: bool = False
    freeze: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "size", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} {value}: it is above 0")
        if self.weights and self.pretrained:
            raise InputError("--weights and --pretrained both say where to start from; give one")
        if self.freeze and not self.fine:
            raise InputError("--freeze keeps weights that have been trained before: it goes with --weights or --pretrained")

    @property
    def fine(self) -> bool:
        return self.weights is not None or self.pretrained


def write_config(model: str, data: OwnData, work_dir: Path, wishes: Wishes) -> tuple[Path, list[str]]:
    """Writes into `work_dir` the config to train `model` on `data` by, the lists of samples that it names, and samples.png.

    Returns the config's path, and sentences about what will be done. Raises InputError for a model that does not fit the data, and
    for a folder in which a run has begun.
    """
    check_fits_data(model, data)
    if list(work_dir.glob("*.pth")):
        raise InputError(f"{work_dir} holds a run; go on with it by: zoo train {work_dir / 'config.py'} --resume; or name another "
                         "folder with --work-dir")
    config, told = BUILDERS[data.task](model, data, wishes)
    config.data_root = str(work_dir.absolute())
    make_folder(work_dir)
    write_samples(data, work_dir / "samples.csv")
    sample_sheet(data).save(work_dir / "samples.png")
    config.dump(str(work_dir / "config.py"))
    return work_dir / "config.py", told


def check_fits_data(model: str, data: OwnData) -> None:
    """Raises InputError for an unknown model, and for one that can do nothing with such data, with those that can."""
    if not timm.is_model(model):
        raise InputError(f"there is no model {model}{near_misses(model, timm.list_models())}")
    if (kind := kind_of(model)) not in KINDS[data.task]:
        raise InputError(f"{model} is {NAMED[kind]}, and {data.root} holds {data.form}, which need {FITTING[data.task]}")


KINDS: dict[Task, tuple[str, ...]] = {"classes": ("network",), "masks": ("network", "unet"), "boxes": ("network",), "volumes": ("unet3d",)}
NAMED = {"network": "a network for pictures", "unet": "a U-Net for pictures and masks", "unet3d": "a U-Net for volumes and masks"}


def kind_of(model: str) -> str:
    """ "unet" or "unet3d" for U-Nets, "network" for other registered models."""
    if sys.modules[timm.model_entrypoint(model).__module__] is not zoo.models.unet:
        return "network"
    return "unet3d" if timm.create_model(model).spatial_dims == 3 else "unet"


def classes_config(model: str, data: OwnData, wishes: Wishes) -> tuple[Config, list[str]]:
    """To tell pictures apart by their classes."""
    sizes = picture_sizes([sample.path for samples in data.splits.values() for sample in samples])
    cfg: Any = timm.get_pretrained_cfg(model)
    size = wishes.size or (cfg.input_size[-1] if wishes.fine else min(cfg.input_size[-1], usual_side(sizes)))
    seen = dict(input_size=(3, size, size), mean=cfg.mean, std=cfg.std)
    mirrored = 0.5 * mirrors(data.classes)
    config, told = started("classes", data, wishes, "accuracy/top1")
    merge(config, {
        "model.name": model, "model.args.num_classes": len(data.classes), "model.args": sized(model, size, cfg.input_size[-1]),
        **{f"{part}_dataloader.dataset": dict(classes=list(data.classes), transform=seen) for part in ("train", "val", "test")},
        "train_dataloader.dataset.transform.hflip": mirrored})
    return config, [f"pictures are seen at {size}x{size}, {'also' if mirrored else 'never'} mirrored", *told]


def started(task: Task, data: OwnData, wishes: Wishes, monitor: str) -> tuple[Config, list[str]]:
    """The house's config for a task with what does not depend on the network: loaders, length, rate, average, patience."""
    config = Config.fromfile(str(files("zoo.configs") / "_base_" / "own" / f"{task}.py"))
    samples = len(data.splits["train"])
    batch = wishes.batch or max(2, min(config.train_dataloader.batch_size, 2 ** int(math.log2(max(1, samples / 10)))))
    if batch > samples:
        raise InputError(f"--batch {batch}: {data.root} has {samples} samples to train on")
    steps = samples * config.train_dataloader.dataset.get("patches", 1) // batch
    wanted, (fewest, most) = (FINE_STEPS, FINE_EPOCHS) if wishes.fine else (STEPS, EPOCHS)
    epochs = wishes.epochs or min(most, max(fewest, math.ceil(wanted / steps)))
    interval = max(1, epochs // 40)
    lr = wishes.lr or (FINE_RATE if wishes.fine else RATE) * math.sqrt(batch / 32)
    warmup = min(max(1, round(WARMING * epochs)), epochs - 1)
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    merge(config, {
        "train_dataloader.batch_size": batch, "train_cfg.max_epochs": epochs, "train_cfg.val_interval": interval,
        **{f"{part}_dataloader.num_workers": workers for part in ("train", "val", "test")},
        "optim_wrapper.optimizer.lr": lr, "param_scheduler.0.end": warmup, "param_scheduler.1.begin": warmup,
        "custom_hooks.1.decay": 1 - 1 / max(2.0, AVERAGED * epochs * steps),
        "custom_hooks.2": dict(monitor=monitor, patience=max(5, epochs // interval // 6)),
        "default_hooks.checkpoint": dict(interval=interval, save_best=monitor), "default_hooks.logger.interval": max(1, min(50, steps))})
    if "test" in data.splits:
        config.test_dataloader.dataset.split = "test"
    start = "from random weights" if not wishes.fine else "from pretrained weights" if wishes.pretrained else f"from {wishes.weights}"
    return config, [
        f"{start}: {epochs} epochs of {steps} steps with {batch} samples at a rate of {lr:.2g}, less if {monitor} stays where it is",
        f"the average of the weights is evaluated {'after every epoch' if interval == 1 else f'every {interval} epochs'}, the best is kept"]


def merge(config: Config, changes: dict[str, Any]) -> None:
    """Puts values at places "a.b.0.c" into the config; of one place, dicts are merged."""
    for place, value in changes.items():
        config.merge_from_dict({place: value})


def usual_side(sizes: Sequence[tuple[int, int]]) -> int:
    """The shorter side that half of the pictures have, as a multiple of the stride of networks."""
    return max(1, round(statistics.median(map(min, sizes)) / STRIDE)) * STRIDE


def mirrors(classes: Sequence[str]) -> bool:
    """Whether a mirror image is of its picture's class, as far as the names of the classes tell."""
    return not any(HANDED.fullmatch(name) for name in classes)


def sized(model: str, size: int, usual: int) -> dict[str, Any]:
    """The arguments by which a model takes pictures of `size`; its usual one needs none, and most networks take any."""
    if size == usual:
        return {}
    try:
        timm.create_model(model, img_size=size)
    except TypeError:
        return {}
    except (AssertionError, ValueError, RuntimeError) as error:
        raise InputError(f"{model} cannot take pictures of {size}x{size}: {error}; --size {usual} is its own") from error
    return {"img_size": size}


BUILDERS: dict[Task, Callable[[str, OwnData, Wishes], tuple[Config, list[str]]]] = {"classes": classes_config}
