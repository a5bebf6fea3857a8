"""Masks of pictures and volumes by a trained network, in sliding windows."""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.files import make_folder, replacing
from zoo.predicting.sheets import annotate, output_files
from zoo.predicting.sliding_windows import segment
from zoo.reading.pictures import PICTURE_SUFFIXES, find_pictures, open_picture, picture_tensor
from zoo.reading.volumes import NIFTI_SUFFIXES, VOLUME_SUFFIXES, Grid, find_volumes, is_volume, open_volume

PALETTE = ((230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60),
           (250, 190, 212), (0, 128, 128), (220, 190, 255), (170, 110, 40), (128, 0, 0), (128, 128, 0), (0, 0, 128))


@dataclass(frozen=True)
class Mask:
    """What was found in a file and where it is written: for every class its name and share of the positions."""

    path: Path
    written: Path
    shares: tuple[tuple[str, float], ...]


def write_masks(model: nn.Module, info: ModelInfo, inputs: Iterable[str | Path], output: str | Path, *,
                window: Sequence[int] | None = None, overlap: float = 0.25,
                progress: Callable[[Path, int, int], None] = lambda path, done, total: None) -> list[Mask]:
    """Segments files and writes what was found.

    Of a volume, a NIfTI mask with the volume's shape and affine; of a picture, the picture overlaid with the classes in
    colours, and their names. `output` is one file, for one input, or a folder, which is made.

    Args:
        window: sizes of the windows; default: those that the network was trained for.
        overlap: share of a window that its neighbours cover too.
        progress: called with the file and the numbers of windows done and in all.

    Raises InputError for files that do not exist, are not of the network's kind, or cannot be written, before any of them
    is segmented; for a damaged one, when its turn comes.
    """
    volumes = len(info.input_size) == 4
    files = find_inputs(inputs, info)
    targets = _targets(files, Path(output), volumes)
    window = tuple(window or info.input_size[1:])
    if Path(output) not in targets:
        make_folder(output)
    classes = cast(int, model.num_classes)
    masks = []
    for path, target in zip(files, targets, strict=True):
        def show(done: int, total: int, path: Path = path) -> None:
            progress(path, done, total)

        x = prepare(info, path)
        try:
            labels = segment(model, x, window, classes=classes, overlap=overlap, progress=show)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        _write(info, path, labels, target)
        counts = torch.bincount(labels.flatten(), minlength=classes) / labels.numel()
        masks.append(Mask(path, target, tuple((info.class_name(i), share) for i, share in enumerate(counts.tolist()))))
    return masks


def prepare(info: ModelInfo, path: Path) -> Tensor:
    """(C, *sizes): the file as the network was trained to see it."""
    if len(info.input_size) == 4:
        return Grid.of(info.data_config).prepare(open_volume(path, info.input_size[0]))
    return picture_tensor(open_picture(path, info.input_size[0]), info.data_config["mean"], info.data_config["std"])


def overlay(picture: Image.Image, labels: Tensor, names: Sequence[str]) -> Image.Image:
    """`picture` half covered by a colour for every class but the first, and below it the names of those that are there."""
    colors = np.array([(0, 0, 0), *PALETTE], np.float32)
    index = labels.numpy().astype(int)
    shown = np.where(index == 0, 0, 1 + (index - 1) % len(PALETTE))
    pixels = np.array(picture.convert("RGB"), np.float32)
    mixed = np.where((index > 0)[..., None], (pixels + colors[shown]) / 2, pixels)
    there: list[int] = [i for i in np.unique(index).tolist() if i]
    return annotate(Image.fromarray(mixed.round().astype(np.uint8)), [names[i] for i in there],
                    [PALETTE[(i - 1) % len(PALETTE)] for i in there])


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


def _targets(files: list[Path], output: Path, volumes: bool) -> list[Path]:
    if not volumes:
        targets = output_files(files, output)
    elif output.suffix and not output.is_dir() and not output.name.lower().endswith(NIFTI_SUFFIXES):
        raise InputError(f"masks of volumes are NIfTI files: {output} is no name of one ({' '.join(NIFTI_SUFFIXES)}) and no folder")
    else:
        targets = output_files(files, output, NIFTI_SUFFIXES, "_mask.nii.gz")
    if len(targets) < len(files):
        raise InputError(f"{len(files)} masks do not fit into one file; give a folder instead of {output}")
    return targets


def _write(info: ModelInfo, path: Path, labels: Tensor, target: Path) -> None:
    if len(info.input_size) == 4:
        Grid.of(info.data_config).write_mask(labels, open_volume(path, info.input_size[0]), target)
        return
    names = [info.class_name(i) for i in range(int(labels.max()) + 1)]
    with replacing(target) as written:
        overlay(open_picture(path), labels, names).save(written)
