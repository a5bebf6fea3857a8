"""Masks of pictures and volumes by a trained network, in sliding windows."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError, times
from zoo.predicting.answers import Answers, Failed, stop
from zoo.predicting.label_maps import Labelled, LabelMaps, background_and
from zoo.predicting.sliding_windows import check_overlap, segment
from zoo.reading.pictures import PICTURE_SUFFIXES, find_pictures, open_picture, picture_tensor
from zoo.reading.volumes import NIFTI_SUFFIXES, VOLUME_SUFFIXES, Grid, find_volumes, is_volume, open_volume


def segment_each(model: nn.Module, info: ModelInfo, files: Iterable[Path], *, window: Sequence[int] | None = None, overlap: float = 0.25,
                 progress: Callable[[Path, int, int], None] = lambda path, done, total: None, failed: Failed = stop) -> Iterator[Labelled]:
    """Segments files, see `find_inputs`, one after the other.

    Args:
        window: sizes of the windows; default: those that the network was trained for.
        overlap: share of a window that its neighbours cover too.
        progress: called with the file and the numbers of windows done and in all.
        failed: called with the path of a file that cannot be read or segmented and why; it is then left out.
    """
    window = tuple(window or info.input_size[1:])
    if len(window) != len(info.input_size) - 1 or min(window) < 1:
        raise InputError(f"the window is {times(window)}, where {info.name} needs {len(info.input_size) - 1} sizes of at least 1")
    check_overlap(overlap)
    classes = cast(int, model.num_classes)
    names = tuple(info.class_name(i) for i in range(classes))
    for path in files:
        def show(done: int, total: int, path: Path = path) -> None:
            progress(path, done, total)

        try:
            x = prepare(info, path)
        except InputError as error:
            failed(path, error)
            continue
        try:
            labels = segment(model, x, window, classes=classes, overlap=overlap, progress=show)
        except InputError as error:
            failed(path, InputError(f"{path}: {error}"))
            continue
        yield Labelled(path, labels.numpy(), names)


def mask_answers(model: nn.Module, info: ModelInfo, inputs: Sequence[Path], output: str | Path) -> Answers:
    """What writes the network's answers. Raises InputError as `Answers` does."""
    if len(info.input_size) == 4:
        return VolumeMasks(inputs, output, info)
    return LabelMaps(inputs, output, background_and(cast(int, model.num_classes)), clear=0)


class VolumeMasks(Answers):
    """Masks of volumes as NIfTI files with the volume's shape and affine; a table of the classes' shares and volumes."""

    columns = ("volume", "label", "class", "share", "millilitres")
    suffixes = NIFTI_SUFFIXES
    endings = ("_mask.nii.gz",)
    one_sheet = False

    def __init__(self, inputs: Sequence[Path], output: str | Path, info: ModelInfo):
        super().__init__(inputs, output)
        self.grid, self.channels = Grid.of(info.data_config), info.input_size[0]

    def flat(self, answer: Labelled) -> list[dict]:
        image = open_volume(answer.path, self.channels)
        millilitres = np.prod(self.grid.voxel_sizes(image)) * answer.labels.size / 1000
        return [{"volume": str(answer.path), "label": label, "class": name, "share": round(share, 6),
                 "millilitres": round(float(share * millilitres), 3)} for label, (name, share) in enumerate(answer.shares())]

    def save(self, answer: Labelled, ending: str, path: Path) -> None:
        self.grid.write_mask(torch.from_numpy(answer.labels), open_volume(answer.path, self.channels), path)


def prepare(info: ModelInfo, path: Path) -> Tensor:
    """(C, *sizes): the file as the network was trained to see it."""
    if len(info.input_size) == 4:
        return Grid.of(info.data_config).prepare(open_volume(path, info.input_size[0]))
    return picture_tensor(open_picture(path, info.input_size[0]), info.data_config["mean"], info.data_config["std"])


def find_inputs(inputs: Iterable[str | Path], info: ModelInfo) -> list[Path]:
    """The files among `inputs` and those below the folders among them. Raises InputError for one that the network does not take."""
    found, volumes = [], len(info.input_size) == 4
    for given in map(Path, inputs):
        if given.is_dir() and volumes:
            below = find_volumes(given, info.input_size[0])
            if not below:
                raise InputError(f"the folder {given} holds no volume ({' '.join(VOLUME_SUFFIXES)})")
            found += below
        else:
            found += find_pictures([given])
    for path in found:
        if is_volume(path) != volumes:
            wanted, came = ("3-D", "2-D picture") if volumes else ("2-D", "3-D volume")
            kind = f"volumes ({' '.join(VOLUME_SUFFIXES)})" if volumes else f"pictures ({' '.join(PICTURE_SUFFIXES)})"
            raise InputError(f"{info.name} is a {wanted} network and takes {kind}; {path} is a {came}")
    return found
