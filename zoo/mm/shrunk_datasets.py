"""Datasets of pictures that are made small, for networks that make them large again.

Items are dicts of `inputs`, the small picture (C, H, W), and `targets`, the picture itself (C, scale·H, scale·W), both uint8. Where it
is cut, turned and mirrored is drawn under the sample's seed (see `zoo.mm.datasets`).
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import DATASETS
from torch import Tensor
from torch.utils.data import Dataset

from zoo.errors import InputError, times
from zoo.mm.datasets import Sample, seeded
from zoo.reading.masks import check_split
from zoo.reading.own_data import read_samples
from zoo.reading.photographs import photographs
from zoo.reading.pictures import find_pictures, open_picture
from zoo.reading.shrinking import cut, shrink


class ShrunkPictures(Dataset):
    """Base of these datasets: makes pictures small, see `zoo.reading.shrinking`, and cuts, turns and mirrors them.

    Subclasses give `names`, one for each picture, and `read(index) -> (C, H, W)` uint8.

    Args:
        scale: how many times smaller they are made.
        crop: side of random squares of the small picture, which are turned and mirrored too; None for whole pictures as they are.
        crops: how many of a picture in an epoch.
        channels: 3, or 1 for grey.
        cache: keep what was read in memory.

    Raises InputError for numbers below 1, and, when it is read, for a picture that is smaller than a square.
    """

    names: Sequence[str]

    def __init__(self, scale: int, crop: int | None = None, crops: int = 1, channels: int = 3, cache: bool = False):
        for called, value in (("scale", scale), ("crop", crop), ("crops", crops)):
            if value is not None and value < 1:
                raise InputError(f"{called}={value}: it has to be at least 1")
        self.metainfo: dict = {"classes": []}
        self.scale, self.crop, self.crops, self.channels = scale, crop, crops, channels
        self.data_config = {"input_size": (channels, crop or 48, crop or 48)}
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.names) * (1 if self.crop is None else self.crops)

    def read(self, index: int) -> Tensor:
        raise NotImplementedError

    def __getitem__(self, sample: Sample) -> dict[str, Tensor]:
        index = sample.index % len(self.names)
        small, large = self._pair(index)
        if self.crop is None:
            return {"inputs": small, "targets": large}
        if min(small.shape[1:]) < self.crop:
            raise InputError(f"{self.names[index]} of {times(large.shape[:0:-1])} pixels is smaller than what is cut out of it, "
                             f"{times((self.scale * self.crop,) * 2)}")
        with seeded(sample.seed):
            top, left = (int(np.random.randint(length - self.crop + 1)) for length in small.shape[1:])
            turned, *mirrored = np.random.randint(2, size=3).astype(bool).tolist()
        parts = []
        for picture, factor in ((small, 1), (large, self.scale)):
            side = factor * self.crop
            part = picture[:, factor * top:factor * top + side, factor * left:factor * left + side]
            part = part.flip([dim for dim, flip in enumerate(mirrored, 1) if flip])
            parts.append((part.transpose(1, 2) if turned else part).contiguous())
        return dict(zip(("inputs", "targets"), parts, strict=True))

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        large = cut(self.read(index), self.scale)
        pair = shrink(large, self.scale), large
        if self.kept is not None:
            self.kept[index] = pair
        return pair


@DATASETS.register_module()
class PhotographsDataset(ShrunkPictures):
    """The ten photographs that scikit-image and scikit-learn ship: astronaut, chelsea and coffee are "val", the other seven "train".

    Args:
        split: "train" or "val".
        args: further arguments of `ShrunkPictures`.
    """

    def __init__(self, split: str, scale: int, **args):
        super().__init__(scale, **args)
        self.pictures = list(photographs(split).items())
        self.names = [name for name, _ in self.pictures]

    def read(self, index: int) -> Tensor:
        return self.pictures[index][1]


@DATASETS.register_module()
class PictureFolderDataset(ShrunkPictures):
    """Pictures in `root/SPLIT` and the folders below.

    Args:
        root: the folder that holds `train` and `val`.
        split: "train" or "val".
        file: name of a CSV in `root`, as `zoo train MODEL DATA` writes it, that lists the pictures in the place of folders.
        args: further arguments of `ShrunkPictures`.
    """

    def __init__(self, root: str, split: str, scale: int, file: str | None = None, **args):
        super().__init__(scale, **args)
        if file is None:
            check_split(split)
        listed = find_pictures([Path(root) / split]) if file is None else [path for path, _ in read_samples(Path(root) / file, split)]
        self.files, self.names = listed, list(map(str, listed))

    def read(self, index: int) -> Tensor:
        picture = open_picture(self.files[index], self.channels)
        return torch.from_numpy(np.array(picture).reshape(picture.height, picture.width, -1)).permute(2, 0, 1).contiguous()
