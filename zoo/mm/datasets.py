"""Datasets of labelled images, and a sampler that makes them reproducible.

What augmentation draws is a pure function of (seed, epoch, image, repeat): the sampler hands out that seed with every
index and the dataset draws under it. So neither the number of workers nor an interruption changes a batch.
"""
import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS, DATASETS, TRANSFORMS
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.constants import DEFAULT_CROP_MODE, DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import MaybeToTensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import Compose

from zoo.errors import InputError, near_misses
from zoo.reading.class_folders import find_classes, list_labelled
from zoo.reading.digits import CLASSES, Digits
from zoo.reading.own_data import read_samples
from zoo.reading.pictures import open_picture


class Sample(NamedTuple):
    """Which image to read, and the seed of everything random that happens to it."""

    index: int
    seed: int


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's generators seeded inside, as they were afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@DATA_SAMPLERS.register_module()
class ReproducibleSampler(Sampler[Sample]):
    """The `Sample`s of an epoch, dealt out to the ranks in turn.

    Shuffled (training), every rank gets the same number, floor(images / ranks); otherwise (evaluation) every image is
    handed out exactly once, without padding. `repeats` > 1 is repeated augmentation (Hoffer et al., 2020; DeiT): every
    image occurs that often in a row in the shuffled order, so that its copies meet in one global batch, and an epoch,
    still as many samples as there are images, covers that fraction of them.
    """

    def __init__(self, dataset: Sized, seed: int | None = 0, shuffle: bool = True, repeats: int = 1):
        if repeats < 1 or (repeats > 1 and not shuffle):
            raise InputError(f"repeats={repeats} with shuffle={shuffle}: repeats is at least 1, and 1 without shuffling")
        self.size = len(dataset)
        self.seed = seed or 0
        self.shuffle = shuffle
        self.repeats = repeats
        self.epoch = 0
        self.rank, self.ranks = get_dist_info()

    def __len__(self) -> int:
        return self.size // self.ranks if self.shuffle else len(range(self.rank, self.size, self.ranks))

    def __iter__(self) -> Iterator[Sample]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size) if self.shuffle else np.arange(self.size)
        for position in range(self.rank, self.rank + len(self) * self.ranks, self.ranks):
            index, repeat = int(order[position // self.repeats]), position % self.repeats
            entropy = np.random.SeedSequence((self.seed, self.epoch, index, repeat))
            yield Sample(index, int(entropy.generate_state(1)[0]))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class LabelledImages(Dataset):
    """Base of the datasets: images as PIL, transformed by timm's `create_transform(**transform)`.

    Items are dicts of `inputs`, a float tensor (C, H, W), and `targets`, a class index. Subclasses give `__len__` and
    `read(index) -> (image, class index)`. `corruption` holds the arguments of a `CorruptImage` that works on what is resized and
    cropped, as ImageNet-C was made.
    """

    def __init__(self, classes: list[str], transform: Mapping, corruption: Mapping | None = None):
        self.metainfo: dict[str, Any] = {"classes": classes}
        try:
            self.transform = cast(Compose, create_transform(**transform))  # it is one: separate parts are not asked for
        except (TypeError, AssertionError) as error:
            raise InputError(f"the transform cannot be set up: {error}") from error
        keep_a_bit(self.transform.transforms)
        if corruption is not None:
            steps = self.transform.transforms
            place = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
            steps.insert(place, TRANSFORMS.build({"type": "CorruptImage", **corruption}))
        size = transform.get("input_size", 224)
        self.data_config = {
            "input_size": (len(transform.get("mean", IMAGENET_DEFAULT_MEAN)), *_pair(size)),
            "mean": tuple(transform.get("mean", IMAGENET_DEFAULT_MEAN)),
            "std": tuple(transform.get("std", IMAGENET_DEFAULT_STD)),
            "interpolation": transform.get("interpolation", "bilinear"),
            "crop_pct": transform.get("crop_pct") or DEFAULT_CROP_PCT,
            "crop_mode": transform.get("crop_mode") or DEFAULT_CROP_MODE,
        }

    def read(self, index: int) -> tuple[Image.Image, int]:
        raise NotImplementedError

    def __getitem__(self, sample: Sample) -> dict:
        image, target = self.read(sample.index)
        with seeded(sample.seed):
            return {"inputs": self.transform(image), "targets": target}


def keep_a_bit(steps: list) -> None:
    """Lets the auto-augmentations among timm's `steps` posterize to one bit where they draw a strength of none, which Pillow refuses."""
    for step in steps:
        for parts in (getattr(step, "ops", ()), *getattr(step, "policy", ())):
            for part in parts:
                if part.aug_fn is auto_augment.posterize:
                    part.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **others: object) -> Image.Image:
    return auto_augment.posterize(image, max(1, bits_to_keep), **others)


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]


@DATASETS.register_module()
class DigitsDataset(LabelledImages):
    """scikit-learn's handwritten digits, `zoo.reading.digits.Digits`.

    Args:
        split, size, mode, limit: see there; `size` is before the transform.
        transform: arguments of timm's `create_transform`.
        corruption: see `LabelledImages`.
    """

    def __init__(self, split: str, transform: Mapping, size: int = 32, mode: str = "L", limit: int | None = None,
                 corruption: Mapping | None = None):
        super().__init__(list(CLASSES), transform, corruption)
        self.digits = Digits(split, size, mode, limit)

    def __len__(self) -> int:
        return len(self.digits)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.digits.read(index)


@DATASETS.register_module()
class ImageFolderDataset(LabelledImages):
    """Pictures in folders named after their classes, as ImageNet is usually kept: `root/train/CLASS/*.jpg`.

    Args:
        root: the folder that holds the splits.
        split: the split's folder below it, "train" or "val", or another, such as ImageNet-C's "fog/3"; "." for `root` itself.
        transform: arguments of timm's `create_transform`.
        classes: where the folders are of some of a model's classes only: the name of timm's list of all, "imagenet-1k" for
            ImageNet-A and -R. Folders are then found in that list, and the scores of classes without a folder do not count.
        corruption: see `LabelledImages`.

    Raises InputError for missing, empty and unknown folders, and on reading for a file that is no picture.
    """

    def __init__(self, root: str, split: str, transform: Mapping, classes: str | None = None, corruption: Mapping | None = None):
        self.folder = Path(root) / split
        names, self.scored = find_classes(root, split, classes)
        super().__init__(names, transform, corruption)
        self.metainfo["scored"] = self.scored
        self.samples: list[tuple[str, int]] = []

    def full_init(self) -> None:
        """Lists the files, which takes a while for a large dataset; the engine calls it before it reads."""
        self.samples = [(path, self.scored[folder]) for path, folder in list_labelled(self.folder)]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return open_picture(path, self.data_config["input_size"][0]), target


@DATASETS.register_module()
class ListedPicturesDataset(LabelledImages):
    """Pictures that a CSV lists, as `zoo train MODEL DATA` writes it: its columns are split, path and label, the name of a class.

    Args:
        root: the folder that holds the file.
        split: which of its rows.
        classes: names of the classes in the order of the model's.
        transform: arguments of timm's `create_transform`.
        file: name of the CSV.
        corruption: see `LabelledImages`.

    Raises InputError for a file that is no such list, and for labels that are no classes.
    """

    def __init__(self, root: str, split: str, classes: Sequence[str], transform: Mapping, file: str = "samples.csv",
                 corruption: Mapping | None = None):
        super().__init__(list(classes), transform, corruption)
        places = {name: place for place, name in enumerate(classes)}
        rows = read_samples(Path(root) / file, split)
        if unknown := next((label for _, label in rows if label not in places), None):
            raise InputError(f"{Path(root) / file} has a label {unknown!r}, which is none of the classes{near_misses(unknown, places)}")
        self.samples = [(path, places[label]) for path, label in rows]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return open_picture(path, self.data_config["input_size"][0]), target
