"""Volumes in NIfTI files: read, brought to what a network was trained on, and masks written back onto the file's own grid."""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError, near_misses, require, times
from zoo.files import replacing
from zoo.reading.masks import check_labels

VOLUME_SUFFIXES = (".nii", ".nii.gz")


def is_volume(path: str | Path) -> bool:
    """Whether the file's name is that of a NIfTI file."""
    return str(path).lower().endswith(VOLUME_SUFFIXES)


def open_volume(path: str | Path) -> Any:
    """The nibabel image at `path`, three-dimensional. Raises InputError if it is none, or its header is damaged."""
    nibabel = _nibabel()
    path = Path(path)
    if not path.is_file():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"there is no volume {path}{near_misses(path.name, others)}")
    try:
        image = nibabel.load(path)
        if len(image.shape) > 3:
            image = nibabel.squeeze_image(image)  # axes of length 1 after the third
        if len(image.shape) != 3:
            raise InputError(f"{path} is of shape {times(image.shape)}, where a volume of three dimensions is needed")
        return image
    except InputError:
        raise
    except Exception as error:  # a damaged file surfaces as whatever its reader stumbles over
        raise InputError(f"the volume {path} cannot be read: {error}") from error


def check_same_grid(image_path: str | Path, image: Any, mask_path: str | Path, mask: Any) -> None:
    """Raises InputError unless both images have one shape and, to a thousandth of a millimetre, one affine."""
    if image.shape != mask.shape:
        raise InputError(f"the mask {mask_path} has {times(mask.shape)} voxels, its volume {image_path} {times(image.shape)}; "
                         "they have to be the same")
    difference = np.abs(np.asarray(image.affine) - mask.affine).max()
    if difference > 1e-3:
        raise InputError(f"the affine of the mask {mask_path} differs from that of {image_path} by {difference:.3g}; "
                         "resample the mask onto the volume's grid")


@dataclass(frozen=True)
class Grid:
    """What is done to volumes before a network sees them: axes turned to right, anterior, superior; voxels resampled; intensities.

    Args:
        spacing: millimetres per voxel along these axes; None keeps the file's.
        clip: (low, high), mapped to 0 and 1, as is usual for CT; None: the voxels that are not 0 get mean 0 and variance 1.
    """

    spacing: tuple[float, float, float] | None = None
    clip: tuple[float, float] | None = None

    @classmethod
    def of(cls, config: Mapping) -> Self:
        return cls(*(tuple(value) if (value := config.get(name)) is not None else None for name in ("spacing", "clip")))

    def prepare(self, image: Any) -> Tensor:
        """(1, X, Y, Z) float32. Raises InputError if the file's data are damaged."""
        volume = self.normalize(_voxels(image))
        if self.spacing is not None:
            volume = F.interpolate(volume[None], self.size(image), mode="trilinear")[0]
        return volume

    def normalize(self, volume: Tensor) -> Tensor:
        if self.clip is not None:
            low, high = self.clip
            return volume.sub_(low).div_(high - low).clamp_(0, 1)
        inside = volume[volume != 0]
        std, mean = torch.std_mean(inside) if inside.numel() > 1 else (torch.ones(()), torch.zeros(()))
        return volume.sub_(mean).div_(std.clamp(min=1e-8))

    def prepare_mask(self, image: Any, classes: int, path: str | Path) -> Tensor:
        """(1, X, Y, Z) uint8. Raises InputError for damaged data and for labels that are not whole numbers below `classes`."""
        labels = _voxels(image)
        check_labels(labels, classes, path)
        labels = labels.to(torch.uint8)
        return labels if self.spacing is None else _nearest(labels, self.size(image))

    def prepare_pair(self, image_path: str | Path, mask_path: str | Path, classes: int) -> tuple[Tensor, Tensor]:
        """A volume and its mask in files, as `prepare` and `prepare_mask` give them. Raises InputError unless they share one grid."""
        image, mask = open_volume(image_path), open_volume(mask_path)
        check_same_grid(image_path, image, mask_path, mask)
        return self.prepare(image), self.prepare_mask(mask, classes, mask_path)

    def size(self, image: Any) -> list[int]:
        """Voxels along each axis after resampling."""
        canonical = _canonical(image)
        zooms = canonical.header.get_zooms()[:3]
        return [max(1, round(n * zoom / new)) for n, zoom, new in zip(canonical.shape, zooms, self.spacing or zooms, strict=True)]

    def voxel_sizes(self, image: Any) -> tuple[float, ...]:
        """Millimetres per voxel along each axis after resampling: what `spacing` asks for, but for rounding to whole voxels."""
        canonical = _canonical(image)
        lengths = np.array(canonical.header.get_zooms()[:3]) * canonical.shape[:3]
        return tuple((lengths / self.size(image)).tolist())

    def write_mask(self, labels: Tensor, image: Any, path: str | Path) -> None:
        """Writes labels (X, Y, Z) uint8 on this grid as a NIfTI file with the shape and affine of `image`."""
        nibabel = _nibabel()
        canonical = _canonical(image)
        if labels.shape != canonical.shape:
            labels = _nearest(labels[None], canonical.shape)[0]
        there = nibabel.orientations.io_orientation(canonical.affine)
        back = nibabel.orientations.ornt_transform(there, nibabel.orientations.io_orientation(image.affine))
        turned = nibabel.orientations.apply_orientation(labels.numpy(), back)
        mask = nibabel.Nifti1Image(np.ascontiguousarray(turned), image.affine, image.header)
        mask.set_data_dtype(np.uint8)
        mask.header.set_slope_inter(1, 0)
        with replacing(path) as written:
            nibabel.save(mask, written)


def _nearest(labels: Tensor, size: list[int] | tuple[int, ...]) -> Tensor:
    return F.interpolate(labels[None], tuple(size), mode="nearest-exact")[0]


def _voxels(image: Any) -> Tensor:
    """(1, X, Y, Z) float32: only here the file is read beyond its header."""
    try:
        return torch.from_numpy(np.asanyarray(_canonical(image).dataobj).astype(np.float32))[None]
    except Exception as error:  # a damaged file surfaces as whatever its reader stumbles over
        raise InputError(f"the volume {image.get_filename()} cannot be read: {error}") from error


def _canonical(image: Any) -> Any:
    return _nibabel().as_closest_canonical(image)


def _nibabel() -> Any:
    require("reading volumes", "volumes", "nibabel")
    import nibabel
    return nibabel
