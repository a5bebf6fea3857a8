"""Training on somebody's own data without a config: the config that suits the data, the machine and what is asked for."""
import dataclasses
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import timm
from mmengine.config import Config

from zoo.checkpoints import check_downloadable, recorded_changes
from zoo.errors import InputError, near_misses, times
from zoo.files import make_folder
from zoo.mm.backbone import TimmBackbone
from zoo.mm.config import PARTS, import_toolbox
from zoo.mm.training import check_model
from zoo.models import is_dense
from zoo.predicting.restoration import scale_of
from zoo.predicting.samples import sample_sheet
from zoo.reading.own_data import OwnData, Sample, Task, picture_sizes, write_samples
from zoo.reading.volumes import Grid, open_volume
from zoo.toolboxes import INSTALL, TOOLBOXES

FITTING = {
    "classes": "a classifier, such as biformer_nano or resnet18",
    "fixations": "a network that says where people look, such as msinet_nano",
    "masks": "a U-Net in 2-D, such as attention_unet_nano, or the backbone of one, such as biformer_nano, or a network that cuts out "
             "objects, such as inspyrenet_nano",
    "boxes": "the backbone of a detector, such as biformer_nano",
    "volumes": "a U-Net in 3-D, such as attention_unet3d_nano",
    "pictures": "a network that restores pictures, such as a2n_nano_x2",
}
Learned = Task | Literal["cutouts"]  # what is learned of masks if they are of one kind of object, by a network that cuts it out
# What mirror images of may be another class, by its name: digits, letters and sides, and whatever has no name.
HANDED = re.compile(r"((class|value) )?\d+|\w|(.*\b|.*_)(left|right|l|r|lh|rh|text|digit|letter)(\b.*|_.*)", re.IGNORECASE)
# Of a training by default, if there are epochs enough. U-Nets in 2-D stay at the background for some hundred steps.
STEPS: dict[Learned, int] = {"classes": 1000, "masks": 2000, "volumes": 1000, "boxes": 1000, "pictures": 1500, "fixations": 1000,
                             "cutouts": 2000}
EPOCHS = (15, 200)  # fewest and most by default
FINE_STEPS, FINE_EPOCHS = 400, (10, 60)  # of weights that have been trained before
# Rates for 32 samples at once, from random weights and from trained ones; they go with the root of the number of samples.
RATES: dict[Learned, tuple[float, float]] = {"classes": (1e-3, 2e-4), "masks": (6e-3, 5e-4), "volumes": (8e-3, 1e-3), "boxes": (4e-3, 4e-4),
                                         "pictures": (1e-3, 2e-4), "fixations": (2e-3, 1e-4), "cutouts": (2e-3, 5e-5)}
AVERAGED = 0.1  # share of the steps that the average of the weights looks back on
WARMING = 0.1  # share of the epochs in which the rate rises
STRIDE = 32  # pixels that sizes are multiples of
WINDOW, WINDOW_3D = 256, 96  # longest sides of what U-Nets see at once
LONGEST = 640  # pixels of a picture that a detector sees
NARROW = 64  # channels of a detector around a network that has no more than 256
LOOKED_AT = 8  # volumes, for their intensities
CROP, CROPS = 48, (4, 64)  # side of what a restoring network sees of a small picture at once, and how often in an epoch of each
KEPT = 100e6  # pixels of pictures that are kept in memory
AIR = -500  # Hounsfield units, below which only computed tomography goes


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
    if wishes.pretrained:
        check_downloadable(getattr(_family(model), "ENCODERS", {}).get(model, model))
    if list(work_dir.glob("*.pth")):
        raise InputError(f"{work_dir} holds a run; go on with it by: zoo train {work_dir / 'config.py'} --resume; or name another "
                         "folder with --work-dir")
    config, told = BUILDERS[data.task](model, data, wishes)
    check_model(config)
    config.data_root = root = str(work_dir.absolute())
    for part in PARTS if data.task == "boxes" else ():
        config[f"{part}_dataloader"].dataset.data_root = root
        if part != "train":
            config[f"{part}_evaluator"].ann_file = f"{root}/{config[f'{part}_evaluator'].ann_file}"
    make_folder(work_dir)
    write_samples(data, work_dir)
    sample_sheet(data).save(work_dir / "samples.png")
    config.dump(str(work_dir / "config.py"))
    return work_dir / "config.py", told


def check_fits_data(model: str, data: OwnData) -> None:
    """Raises InputError for an unknown model, and for one that can do nothing with such data, with those that can."""
    if not timm.is_model(model):
        raise InputError(f"there is no model {model}{near_misses(model, timm.list_models())}")
    if (kind := kind_of(model)) not in KINDS[data.task]:
        raise InputError(f"{model} is {NAMED[kind]}, and {data.root} holds {data.form}, which need {FITTING[data.task]}")


KINDS: dict[Task, tuple[str, ...]] = {
    "classes": ("network",), "masks": ("network", "unet", "saliency"), "boxes": ("network",), "volumes": ("unet3d",),
    "pictures": ("restoration",), "fixations": ("fixations",)}
NAMED = {"network": "a network for pictures", "unet": "a U-Net for pictures and masks", "unet3d": "a U-Net for volumes and masks",
         "restoration": "a network that restores pictures", "fixations": "a network that says where people look",
         "saliency": "a network that cuts out objects"}


def kind_of(model: str) -> str:
    """ "unet" or "unet3d" for U-Nets, the task of networks that have one of their own, "network" for other registered models."""
    if (task := getattr(_family(model), "TASK", None)) is not None:
        return task
    if not is_dense(model):
        return "network"
    return "unet3d" if timm.create_model(model).spatial_dims == 3 else "unet"


def _family(model: str) -> object:
    """The module that registers the model."""
    return sys.modules[timm.model_entrypoint(model).__module__]


def classes_config(model: str, data: OwnData, wishes: Wishes) -> tuple[Config, list[str]]:
    """To tell pictures apart by their classes."""
    sizes = picture_sizes([sample.path for samples in data.splits.values() for sample in samples])
    usual = cast(Any, timm.get_pretrained_cfg(model)).input_size[-1]
    size = wishes.size or (usual if wishes.fine else min(usual, usual_side(sizes)))
    try:
        args = sized(model, size, usual)
    except InputError:
        if wishes.size:
            raise
        size, args = usual, {}
    seen = dict(input_size=(3, size, size), **normalization(model))
    mirrored = 0.5 * mirrors(data.classes)
    config, told = started("classes", data, wishes, "accuracy/top1")
    told += _go_on_with_changes(config, wishes)
    merge(config, {
        "model.name": model, "model.args.num_classes": len(data.classes), "model.args": args,
        **{f"{part}_dataloader.dataset": dict(classes=list(data.classes), transform=seen) for part in PARTS},
        "train_dataloader.dataset.transform.hflip": mirrored, **of_network(wishes, "model.args")})
    return config, [f"pictures {extent(sizes)} pixels are seen at {size}×{size}, {mirrored_or_not(mirrored)}", *told]


def _go_on_with_changes(config: Config, wishes: Wishes) -> list[str]:
    """Has the network changed as that of the weights was; attention that has a share begins to fade out."""
    changes = recorded_changes(wishes.weights) if wishes.weights else []
    if not changes:
        return []
    config.model.changes = changes
    fading: set[int] = set()
    for change in changes:
        if change["type"] == "remove_attention":
            fading = fading - set(change["blocks"]) if change.get("share") is None else fading | set(change["blocks"])
    told = [f"the network is changed as that of {wishes.weights}: {', '.join(change['type'] for change in changes)}"]
    if fading:
        config.custom_hooks[1] = dict(type="AttentionDilutionHook")  # in the place of patience, which could end too early
        told.append(f"attention fades out of blocks {', '.join(map(str, sorted(fading)))}; the best is of the epochs after that")
    return told


def started(task: Learned, data: OwnData, wishes: Wishes, monitor: str, patches: int = 1) -> tuple[Config, list[str]]:
    """The house's config for a task with what does not depend on the network: loaders, length, rate, average, patience."""
    config = Config.fromfile(str(files("zoo.configs") / "_base_" / "own" / f"{task}.py"))
    samples = sum(sample.labels != () for sample in data.splits["train"])
    batch = wishes.batch or max(2, min(config.train_dataloader.batch_size, 2 ** int(math.log2(max(1, samples / 10)))))
    if batch > samples * patches:
        raise InputError(f"--batch {batch}: {data.root} has {samples} samples to train on")
    steps = samples * patches // batch
    wanted, (fewest, most) = (FINE_STEPS, FINE_EPOCHS) if wishes.fine else (STEPS[data.task], EPOCHS)
    epochs = wishes.epochs or min(most, max(fewest, math.ceil(wanted / steps)))
    interval = max(1, epochs // 40)
    lr = wishes.lr or RATES[data.task][wishes.fine] * math.sqrt(batch / 32)
    warmup = max(1, round(WARMING * epochs))
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    merge(config, {
        "train_dataloader.batch_size": batch, "train_cfg.max_epochs": epochs, "train_cfg.val_interval": interval,
        **{f"{part}_dataloader.num_workers": workers for part in PARTS},
        "optim_wrapper.optimizer.lr": lr, "param_scheduler.0.end": warmup, "param_scheduler.1.begin": warmup,
        "custom_hooks.0.decay": 1 - 1 / max(2.0, AVERAGED * epochs * steps),
        "custom_hooks.1": dict(monitor=monitor, patience=max(5, epochs // interval // 6)),
        "default_hooks.checkpoint": dict(interval=interval, save_best=monitor, rule="greater"),
        "default_hooks.logger.interval": max(1, min(50, steps))})
    if "test" in data.splits and task == "boxes":
        config.test_dataloader.dataset.ann_file = config.test_evaluator.ann_file = "test.json"
    elif "test" in data.splits:
        config.test_dataloader.dataset.split = "test"
    if wishes.weights is not None and not Path(wishes.weights).is_file():
        raise InputError(f"there is no file {wishes.weights}; --weights takes one")
    start = "from random weights" if not wishes.fine else "from pretrained weights" if wishes.pretrained else f"from {wishes.weights}"
    return config, [
        f"{start}: {epochs} epochs of {steps} steps with {batch} samples at a rate of {lr:.2g}, less if {monitor} stays where it is",
        f"the average of the weights is evaluated {'after every epoch' if interval == 1 else f'every {interval} epochs'}, the best is kept"]


def of_network(wishes: Wishes, args: str) -> dict[str, Any]:
    """What a model of the house's is told of the weights that it starts from; `args` is the place of timm's arguments."""
    weights = {"model.weights": str(Path(wishes.weights).absolute())} if wishes.weights else {}
    return {**weights, **({f"{args}.pretrained": True} if wishes.pretrained else {}), **({"model.freeze": True} if wishes.freeze else {})}


def merge(config: Config, changes: dict[str, Any]) -> None:
    """Puts values at places "a.b.0.c" into the config; of one place, dicts are merged."""
    for place, value in changes.items():
        config.merge_from_dict({place: value})


def normalization(model: str) -> dict[str, list[float]]:
    """Mean and standard deviation of the channels of pictures, between 0 and 1, as the model's weights expect them."""
    cfg: Any = timm.get_pretrained_cfg(model)
    return {"mean": list(cfg.mean), "std": list(cfg.std)}


def mirrored_or_not(mirrored: float) -> str:
    return f"{'also' if mirrored else 'never'} mirrored"


def extent(sizes: Sequence[Sequence[int]]) -> str:
    """The smallest and the largest of sizes."""
    small, large = (times(chosen(sizes, key=math.prod)) for chosen in (min, max))
    return f"of {small}" if small == large else f"from {small} to {large}"


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


def masks_config(model: str, data: OwnData, wishes: Wishes) -> tuple[Config, list[str]]:
    """To say of every pixel its class: the U-Net, or one around the network; or to cut out what the masks show."""
    if kind_of(model) == "saliency":
        return cutouts_config(model, data, wishes)
    sizes = picture_sizes(sample.path for samples in data.splits.values() for sample in samples)
    widths, heights = zip(*sizes, strict=True)
    window = [wishes.size or inner_side(min(sides), WINDOW, STRIDE) for sides in (heights, widths)]
    named = {"name": model} if kind_of(model) == "unet" else {"name": "attention_unet", "args": {"encoder": model}}
    mirrored = mirrors(data.classes)
    config, told = started("masks", data, wishes, "iou/mean")
    merge(config, {
        "model": named, "model.args.num_classes": len(data.classes), "model.window": window, "train_dataloader.dataset.patch": window,
        **{f"{part}_dataloader.dataset": dict(classes=list(data.classes), window=window, **normalization(model), **stored(data))
           for part in PARTS},
        "train_dataloader.dataset.transforms.0.prob": 0.5 * mirrored,
        **of_network(wishes, "model.args.encoder_args" if "args" in named else "model.args")})
    return config, [f"of pictures {extent(sizes)} pixels windows of {times(window[::-1])} are seen, {mirrored_or_not(mirrored)}", *told]


def cutouts_config(model: str, data: OwnData, wishes: Wishes) -> tuple[Config, list[str]]:
    """To cut out what is not background in the masks, from pictures that are brought to one size."""
    if wishes.freeze:
        raise InputError(f"--freeze leaves nothing of {model} to learn, which has no head for other data")
    soft = len(data.classes) > 2 and min(data.values) == 0 and max(data.values) == 255
    if len(data.classes) > 2 and not soft:
        raise InputError(f"{model} cuts out objects of one kind, and the masks of {data.root} have {len(data.classes)} classes")
    sizes = picture_sizes(sample.path for samples in data.splits.values() for sample in samples)
    usual = cast(Any, timm.get_pretrained_cfg(model)).input_size[-1]
    size = wishes.size or (usual if wishes.fine else min(usual, usual_side(sizes)))
    if size % STRIDE:
        raise InputError(f"--size {size}: {model} is trained at multiples of {STRIDE} pixels")
    mirrored = mirrors(data.classes[1:])
    config, told = started("cutouts", data, wishes, "saliency/S")
    start = 128 if soft else max(data.values)
    merge(config, {
        "model.name": model, "model.args": dict(base_size=(size, size)),
        **{f"{part}_dataloader.dataset": dict(size=(size, size), object_from=start, **normalization(model)) for part in PARTS},
        "train_dataloader.dataset.transforms.2.prob": 0.5 * mirrored, **of_network(wishes, "model.args")})
    return config, [f"pictures {extent(sizes)} pixels are seen at {size}×{size}, what has {start} in a mask{' or more' if soft else ''} is "
                    f"cut out; turned by up to ten degrees, zoomed, {mirrored_or_not(mirrored)}", *told]


def stored(data: OwnData) -> dict[str, Any]:
    """The values of the classes in masks, where they are others than their places."""
    return {} if data.values == tuple(range(len(data.classes))) else {"mask_values": list(data.values)}


def inner_side(length: int, most: int, multiple: int) -> int:
    """The side of windows in pictures or volumes of that length: `most`, or what fits, if it can be a multiple."""
    return min(most, length // multiple * multiple or length)


def volumes_config(model: str, data: OwnData, wishes: Wishes) -> tuple[Config, list[str]]:
    """To say of every voxel its class, by a U-Net in 3-D. Volumes are brought to the spacing that half of them exceed, if they differ."""
    images = [open_volume(sample.path, data.channels) for sample in data.splits["train"]]
    spacings = np.array([Grid().voxel_sizes(image) for image in images])
    spacing = None if (spacings.max(0) < 1.01 * spacings.min(0)).all() else np.median(spacings, 0).round(3).tolist()
    clip = intensities(data.splits["train"]) if data.channels == 1 else None
    grid = Grid.of({"spacing": spacing})
    sizes = np.array([grid.size(image) for image in images])
    window = [min(wishes.size or WINDOW_3D, inner_side(int(side), WINDOW_3D, 8)) for side in sizes.min(0)]
    patches = max(4, min(32, round(float(np.median(sizes.prod(1))) / math.prod(window))))
    mirrored = mirrors(data.classes)
    config, told = started("volumes", data, wishes, "dice/mean", patches)
    seen = dict(classes=list(data.classes), window=window, spacing=spacing, clip=clip, channels=data.channels)
    merge(config, {
        "model.name": model, "model.args": dict(num_classes=len(data.classes), in_chans=data.channels), "model.window": window,
        **{f"{part}_dataloader.dataset": seen for part in PARTS},
        "train_dataloader.dataset.patch": window, "train_dataloader.dataset.patches": patches,
        "train_dataloader.dataset.transforms.0.prob": 0.5 * mirrored, **of_network(wishes, "model.args")})
    return config, [
        f"of volumes {extent(sizes.tolist())} voxels windows of {times(window)} are seen, {patches} of each in an epoch, "
        f"{mirrored_or_not(mirrored)}",
        f"spacing: {f'{times(spacing)} mm' if spacing else 'as it is'}; intensities: "
        f"{f'clipped to {clip[0]:g} to {clip[1]:g}' if clip else 'mean 0 and variance 1'}", *told]


def intensities(samples: Sequence[Sample]) -> list[float] | None:
    """Of computed tomography the range to clip to, nnU-Net's: all but a hundredth of what the masks show. None of other volumes."""
    shown = []
    for sample in samples[::-(-len(samples) // LOOKED_AT)]:
        voxels, labels = (np.asanyarray(open_volume(path).dataobj) for path in (sample.path, cast(Path, sample.mask)))
        if np.nanmin(voxels) > AIR:
            return None
        shown.append(voxels[(labels > 0) & np.isfinite(voxels)])
    found = np.concatenate(shown)
    low, high = np.percentile(found, (0.5, 99.5)).round().tolist() if found.size else (0.0, 0.0)
    return [low, high] if low < high else None


def boxes_config(model: str, data: OwnData, wishes: Wishes) -> tuple[Config, list[str]]:
    """To find boxes, and masks where all boxes have them: Mask R-CNN or Faster R-CNN around the network."""
    try:
        import_toolbox("mmdet")
    except ImportError as error:
        raise InputError(f"boxes are learned with {TOOLBOXES['mmdet']}; {INSTALL}") from error
    sizes = [sample.size for sample in data.splits["train"]]
    size = wishes.size or min(LONGEST, -(-int(statistics.median(map(max, sizes))) // STRIDE) * STRIDE)
    sides = [math.sqrt(box["bbox"][2] * box["bbox"][3]) * size / max(width, height)
             for sample, (width, height) in zip(data.splits["train"], sizes, strict=True) for box in sample.boxes]
    small = statistics.quantiles(sides, n=10)[0] if len(sides) > 1 else sides[0]  # a tenth of the boxes are smaller
    monitor = "coco/segm_mAP" if data.outlined else "coco/bbox_mAP"
    config, told = started("boxes", data, wishes, monitor)
    backbone = TimmBackbone(model)
    widths = list(backbone.channels)
    narrow = NARROW if max(widths) <= 256 else 256
    head = dict(in_channels=narrow, num_classes=len(data.classes))
    objects = max(len(sample.boxes) for sample in data.splits["train"])
    kept = min(1000, max(50, 16 * objects))  # proposals of a picture; the usual thousands are for pictures of COCO's, and as slow
    proposals = dict(nms_pre=2 * kept, max_per_img=kept)
    levels = {"out_channels": narrow, "finest_scale": min(56, max(12, round(2 * small)))}
    strides = [4 * 2**level for level in range(len(widths) + 1)]
    mirrored = mirrors(data.classes)
    merge(config, {
        "model.data_preprocessor": {key: [255 * value for value in values] for key, values in normalization(model).items()},
        "model.backbone.name": model, "model.neck": dict(in_channels=widths, out_channels=narrow, num_outs=len(widths) + 1),
        "model.rpn_head": dict(in_channels=narrow, feat_channels=narrow),
        "model.rpn_head.anchor_generator": dict(scales=[min(8, max(2, round(small / 4)))], strides=strides),
        "model.roi_head.bbox_roi_extractor": levels, "model.roi_head.mask_roi_extractor": levels,
        "model.roi_head.bbox_head": {**head, "fc_out_channels": 4 * narrow},
        "model.roi_head.mask_head": {**head, "conv_out_channels": narrow, "num_convs": 2 if narrow == NARROW else 4},
        "model.train_cfg.rpn.sampler.num": min(256, max(64, 8 * objects)),
        "model.train_cfg.rcnn.sampler.num": min(512, max(32, 8 * objects)),
        "model.train_cfg.rpn_proposal": proposals, "model.test_cfg.rpn": proposals,
        **{f"{part}_dataloader.dataset.metainfo.classes": tuple(data.classes) for part in PARTS},
        **{f"{part}_dataloader.dataset.pipeline.{step}.scale": (size, size) for part, step in zip(PARTS, (2, 1, 1), strict=True)},
        "train_dataloader.dataset.pipeline.3.prob": 0.5 * mirrored})
    if wishes.weights:
        config.model.backbone.checkpoint = str(Path(wishes.weights).absolute())
    if wishes.pretrained:
        config.model.backbone.args = dict(pretrained=True)
    if wishes.freeze:
        config.model.backbone.frozen_stages = backbone.parts
    if not data.outlined:
        config.model.type = "FasterRCNN"
        for part in ("mask_roi_extractor", "mask_head"):
            del config.model.roi_head[part]
        for part, step in zip(PARTS, (1, 2, 2), strict=True):
            config[f"{part}_dataloader"].dataset.pipeline[step].with_mask = False
        for part in PARTS[1:]:
            config[f"{part}_evaluator"].metric = ["bbox"]
    return config, [f"{'Mask' if data.outlined else 'Faster'} R-CNN around {model}; pictures {extent(sizes)} pixels are seen at {size}, "
                    f"{mirrored_or_not(mirrored)}", *told]


def pictures_config(model: str, data: OwnData, wishes: Wishes) -> tuple[Config, list[str]]:
    """To make small pictures large again, `scale` times, as the network's name has it."""
    if wishes.freeze:
        raise InputError(f"--freeze leaves nothing of {model} to learn, which has no head for other data")
    scale = scale_of(timm.create_model(model, device="meta"))
    sizes = picture_sizes([sample.path for samples in data.splits.values() for sample in samples])
    least = picture_sizes([sample.path for sample in data.splits["train"]])
    crop = min(wishes.size or CROP, min(map(min, least)) // scale)
    if crop < 1:
        raise InputError(f"a picture of {data.root} has fewer than {scale} pixels on a side, which {model} makes of one")
    fewest, most = CROPS
    crops = max(fewest, min(most, round(statistics.median(map(math.prod, sizes)) / (scale * crop) ** 2)))
    wishes = dataclasses.replace(wishes, batch=wishes.batch or min(16, crops * len(least)))
    config, told = started("pictures", data, wishes, "restoration/psnr", crops)
    cache = sum(map(math.prod, sizes)) <= KEPT
    merge(config, {
        "model.name": model, **{f"{part}_dataloader.dataset": dict(scale=scale, cache=cache) for part in PARTS},
        "train_dataloader.dataset": dict(crop=crop, crops=crops), **of_network(wishes, "model.args")})
    return config, [f"pictures {extent(sizes)} pixels are made {scale} times smaller, and squares of {scale * crop} pixels are learned, "
                    f"{crops} of each in an epoch, turned and mirrored", *told]


def fixations_config(model: str, data: OwnData, wishes: Wishes) -> tuple[Config, list[str]]:
    """To say where people look, seen at the size that suits half of the pictures."""
    sizes = picture_sizes(sample.path for samples in data.splits.values() for sample in samples)
    usual = cast(Any, timm.get_pretrained_cfg(model)).input_size[1:]
    longest = wishes.size or max(usual)
    width, height = (statistics.median(sides) for sides in zip(*sizes, strict=True))
    step = cast(int, timm.create_model(model, device="meta").reduction)
    seen = [max(1, round(side * longest / max(width, height) / step)) * step for side in (height, width)]
    config, told = started("fixations", data, wishes, "fixations/cc")
    merge(config, {
        "model.name": model, **{f"{part}_dataloader.dataset": dict(size=seen, **normalization(model)) for part in PARTS},
        **of_network(wishes, "model.args")})
    return config, [f"pictures {extent(sizes)} pixels are seen at {seen[1]}×{seen[0]}, in proportion, {mirrored_or_not(True)}", *told]


BUILDERS: dict[Task, Callable[[str, OwnData, Wishes], tuple[Config, list[str]]]] = {
    "classes": classes_config, "masks": masks_config, "volumes": volumes_config, "boxes": boxes_config,
    "pictures": pictures_config, "fixations": fixations_config}
