"""Datasets of images and volumes with masks, for segmentation.

Items are dicts of `inputs`, a float tensor (C, *sizes), and `targets`, class indices (*sizes). Random transforms are MONAI's,
drawn under the sample's seed (see `zoo.mm.datasets`). Items of whole volumes also have `spacing` (3,), millimetres per voxel.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import DATASETS, TRANSFORMS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from zoo.errors import InputError, times
from zoo.mm.datasets import Sample, seeded
from zoo.mm.monai import monai_part
from zoo.predicting.sliding_windows import padded
from zoo.reading.brain import MATTER, read_hemisphere
from zoo.reading.decathlon import read_decathlon
from zoo.reading.digits import CLASSES, Digits, grey_scene
from zoo.reading.masks import MaskValues, paired_files, read_masked_picture
from zoo.reading.own_data import read_samples
from zoo.reading.pictures import PICTURE_SUFFIXES, picture_tensor
from zoo.reading.say import say_once
from zoo.reading.volumes import VOLUME_SUFFIXES, Grid, open_volume

KEYS = ("inputs", "targets")


class MaskedImages(Dataset):
    """Base of these datasets: reads, transforms, and cuts patches.

    Subclasses give `names`, one for each image, and `read(index) -> (inputs (C, *sizes), targets (1, *sizes))`.

    Args:
        classes: names of the classes in the order of their labels, the background first.
        transforms: random dictionary transforms of MONAI, each a dict of `type` and arguments; `keys` are both tensors where
            not given.
        patch: sizes of random patches; None for whole images. Images that are smaller are padded with zeros, of class 0.
        patches: how many of an image in an epoch.
        cache: keep what was read in memory.
    """

    names: Sequence[str]

    def __init__(self, classes: Sequence[str], transforms: Sequence[Mapping] = (), patch: Sequence[int] | None = None, patches: int = 1,
                 cache: bool = False):
        self.metainfo = {"classes": list(classes)}
        self.patch, self.patches = patch, patches
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None
        steps = [{"keys": KEYS, **transform} for transform in transforms]
        if patch is not None:
            steps.insert(0, {"type": "RandSpatialCropd", "keys": KEYS, "roi_size": tuple(patch), "random_size": False})
        self.steps = [monai_part("transforms", step) for step in steps]
        if steps:
            from monai.data import set_track_meta

            set_track_meta(False)

    def __len__(self) -> int:
        return self.patches * len(self.names)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __getitem__(self, sample: Sample) -> dict:
        inputs, targets = self._read(sample.index % len(self.names))
        item = {"inputs": inputs, "targets": targets}
        with seeded(sample.seed):
            for step in self.steps:
                if hasattr(step, "set_random_state"):
                    step.set_random_state(np.random.randint(2**31))
                item = step(item)
        found = {"inputs": torch.as_tensor(item["inputs"]).contiguous(), "targets": torch.as_tensor(item["targets"])[0].long()}
        spacing = self.spacing(sample.index % len(self.names)) if self.patch is None else None
        return found if spacing is None else {**found, "spacing": torch.tensor(spacing)}

    def spacing(self, index: int) -> tuple[float, ...] | None:
        """Millimetres per position along the axes of what `read` gives, if there are any; items of whole images have it."""
        return None

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        inputs, targets = self.read(index)
        if self.patch is not None:
            if len(self.patch) != inputs.ndim - 1:
                raise InputError(f"patch={tuple(self.patch)}: {self.names[index]} has {times(inputs.shape[1:])} positions")
            (inputs, _), (targets, _) = padded(inputs, self.patch), padded(targets, self.patch)
        if self.kept is not None:
            self.kept[index] = inputs, targets
        return inputs, targets


class MaskedPictures(MaskedImages):
    """Base of datasets of pictures; their `data_config` has `mean` and `std` of the channels.

    Args:
        corruption: arguments of a `CorruptImage` through which pictures go before all else.
    """

    data_config: dict

    def __init__(self, classes: Sequence[str], corruption: Mapping | None = None, **args):
        super().__init__(classes, **args)
        if corruption is not None:
            self.corruption = TRANSFORMS.build({"type": "CorruptImage", **corruption})
            self.steps.insert(0, self._corrupt)

    def _corrupt(self, item: dict) -> dict:
        mean, std = self.data_config["mean"], self.data_config["std"]
        pixels = item["inputs"] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        picture = to_pil_image(pixels.clamp(0, 1).mul(255).round().byte())
        return {**item, "inputs": picture_tensor(self.corruption(picture), mean, std)}


class Volumes(MaskedImages):
    """Base of datasets of files; `files` are pairs of a volume and its mask.

    Args:
        window: what the network looks at in one go when it predicts, recorded in checkpoints.
        spacing, clip: see `zoo.reading.volumes.Grid`; recorded too.
        channels: see `zoo.reading.volumes.open_volume`.
    """

    def __init__(self, classes: Sequence[str], files: Sequence[tuple[Path, Path]], window: Sequence[int],
                 spacing: Sequence[float] | None = None, clip: Sequence[float] | None = None, channels: int = 1, **args):
        super().__init__(classes, **args)
        self.data_config = {"input_size": (channels, *window), "spacing": spacing and tuple(spacing), "clip": clip and tuple(clip)}
        self.grid = Grid.of(self.data_config)
        self.files = list(files)
        self.said = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # among the processes that load data

    @property
    def names(self) -> list[str]:
        return [str(image) for image, _ in self.files]

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        say = (lambda *text: None) if self.said[index] else say_once
        self.said[index] = True
        return self.grid.prepare_pair(*self.files[index], len(self.metainfo["classes"]), self.data_config["input_size"][0], say)

    def spacing(self, index: int) -> tuple[float, ...]:
        return self.grid.voxel_sizes(open_volume(self.files[index][0], self.data_config["input_size"][0]))


def listed_files(path: Path, split: str) -> list[tuple[Path, Path]]:
    """The pairs of a picture or volume and its mask that a CSV has for the split."""
    return [(image, Path(mask)) for image, mask in read_samples(path, split)]


@DATASETS.register_module()
class MNI152Dataset(MaskedImages):
    """The T1 template of the MNI152 brain that nilearn ships, with grey and white matter, an image for each hemisphere.

    See `zoo.reading.brain.read_hemisphere`; "train" is the left hemisphere, "val" the right.

    Args:
        split: "train" or "val".
        window: as for `Volumes`.
        resolution: millimetres per voxel, 1 or more.
        args: further arguments of `MaskedImages`.
    """

    def __init__(self, split: str, window: Sequence[int], resolution: int = 2, **args):
        super().__init__(MATTER, **args)
        self.names = [f"the {'left' if split == 'train' else 'right'} hemisphere"]
        self.data_config = {"input_size": (1, *window), "spacing": (float(resolution),) * 3, "clip": None}
        self.volume = read_hemisphere(split, resolution)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        return self.volume

    def spacing(self, index: int) -> tuple[float, ...]:
        return self.data_config["spacing"]


@DATASETS.register_module()
class DecathlonDataset(Volumes):
    """A task of the Medical Segmentation Decathlon or nnU-Net, or whatever else has their `dataset.json`, such as BTCV's.

    The file's `labels` name the classes, its `modality` or `channel_names` the channels. Which volumes are the "val" part, see
    `zoo.reading.decathlon.read_decathlon`.

    Args:
        root: the folder that holds the file and what it names.
        split: "train" or "val".
        folds: see above.
        file: name of the JSON file.
        args: further arguments of `Volumes`.
    """

    def __init__(self, root: str, split: str, window: Sequence[int], folds: int = 5, file: str = "dataset.json", **args):
        task = read_decathlon(Path(root) / file, split, folds)
        files = task.training if split == "train" else task.validation
        super().__init__(task.classes, files, window, channels=task.channels, **args)


@DATASETS.register_module()
class VolumeFolderDataset(Volumes):
    """Volumes in folders, as TCIA's Pancreas-CT or BTCV are usually kept: `root/SPLIT/images/*.nii.gz` and `root/SPLIT/labels`.

    Which mask is a volume's, `zoo.reading.pairs.pair` says.

    Args:
        root: the folder that holds `train` and `val`.
        split: "train" or "val".
        classes: names in the order of the labels in the masks, the background first.
        file: name of a CSV in `root`, as `zoo train MODEL DATA` writes it, that lists the pairs in the place of folders.
        args: further arguments of `Volumes`.
    """

    def __init__(self, root: str, split: str, classes: Sequence[str], window: Sequence[int], file: str | None = None, **args):
        files = listed_files(Path(root) / file, split) if file else paired_files(Path(root), split, "labels", VOLUME_SUFFIXES)
        super().__init__(classes, files, window, **args)


@DATASETS.register_module()
class PictureMaskDataset(MaskedPictures):
    """Pictures in `root/SPLIT/images` and masks in `root/SPLIT/masks`, whose pixels say the classes.

    Which mask is a picture's, `zoo.reading.pairs.pair` says.

    Args:
        root: the folder that holds `train` and `val`.
        split: "train" or "val".
        classes: names in the order of the labels, the background first.
        window: sizes of the windows in which the network predicts, recorded in checkpoints.
        mean, std: of every channel, for pixels between 0 and 1; one number for grey pictures.
        mask_values: what stands for the classes in the masks, in their order. By default their numbers, 0, 1, …, or for two classes
            0 and 255, see `zoo.reading.masks.MaskValues`.
        file: name of a CSV in `root`, as `zoo train MODEL DATA` writes it, that lists the pairs in the place of folders.
        args: further arguments of `MaskedPictures`.
    """

    def __init__(self, root: str, split: str, classes: Sequence[str], window: Sequence[int],
                 mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD,
                 mask_values: Sequence[int] | None = None, file: str | None = None, **args):
        super().__init__(classes, **args)
        self.files = listed_files(Path(root) / file, split) if file else paired_files(Path(root), split, "masks", PICTURE_SUFFIXES)
        self.names = [str(image) for image, _ in self.files]
        self.values = MaskValues.of(len(classes), [mask for _, mask in self.files], mask_values)
        self.data_config = {"input_size": (len(mean), *window), "mean": tuple(mean), "std": tuple(std)}

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        config = self.data_config
        return read_masked_picture(*self.files[index], config["mean"], config["std"], self.values)


@DATASETS.register_module()
class DigitScenesDataset(MaskedPictures):
    """Scenes of scikit-learn's handwritten digits, `zoo.reading.digits.grey_scene`; a pixel of ink is of its digit's class.

    Scene i is a pure function of (split, i). The digits of "train" and "val" are those of `DigitsDataset`.

    Args:
        split: "train" or "val".
        scenes: how many.
        size: pixels on a side.
        args: further arguments of `MaskedPictures`.
    """

    def __init__(self, split: str, scenes: int, size: int = 64, **args):
        super().__init__(["background", *CLASSES], **args)
        self.digits = Digits(split)
        self.split, self.size = split, size
        self.names = [f"scene {i}" for i in range(scenes)]
        self.data_config = {"input_size": (1, size, size), "mean": (0.5,), "std": (0.25,)}

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        scene, labels = grey_scene(self.digits, self.size, np.random.default_rng((self.split == "val", index)))
        mean, std = self.data_config["mean"][0], self.data_config["std"][0]
        return torch.from_numpy((scene - mean) / std).float()[None], torch.from_numpy(labels)[None]
