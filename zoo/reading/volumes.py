"""Volumes in files: read, brought to what a network was trained on, and masks written back onto the file's own grid."""
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError, near_misses, require, times
from zoo.files import replacing
from zoo.reading.masks import check_labels, label_dtype
from zoo.reading.pictures import files_below
from zoo.reading.say import say_once

NIFTI_SUFFIXES = (".nii", ".nii.gz")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, ".mgz", ".mgh", ".hdr")  # an .hdr has its voxels in the .img beside it
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}  # per unit of a NIfTI header
FIRST_CHANNEL = re.compile(r"(.+)_0000(\.nii\.gz|\.\w+)")  # as nnU-Net names files


Read = TypeVar("Read")
Say = Callable[..., object]


def is_volume(path: str | Path) -> bool:
    """Whether the file's name is that of a NIfTI, Analyze or MGH file."""
    return str(path).lower().endswith((*VOLUME_SUFFIXES, ".img"))


def find_volumes(folder: Path, channels: int = 1) -> list[Path]:
    """The volumes below `folder`; of those with their channels in files of their own, see `open_volume`, the files of the first."""
    found = files_below(folder, VOLUME_SUFFIXES)
    others = {other for path in found if channels > 1 for other in channel_files(path, channels)[1:]}
    return [path for path in found if path not in others]


def channel_files(path: Path, channels: int) -> list[Path]:
    """`path`, or where it ends in _0000, the files of all channels: CASE_0000.nii.gz, CASE_0001.nii.gz, …"""
    match = FIRST_CHANNEL.fullmatch(path.name)
    return [path.with_name(f"{match[1]}_{i:04d}{match[2]}") for i in range(channels)] if match else [path]


def open_volume(path: str | Path, channels: int = 1) -> Any:
    """The nibabel image at `path`: three-dimensional, of several channels four-dimensional with these as its last axis.

    They are in the one file, or in files of three dimensions, as nnU-Net has them: CASE_0000.nii.gz, CASE_0001.nii.gz, …
    Raises InputError if it is none, or its header is damaged.
    """
    path = Path(path)
    image = _open(path)
    files = channel_files(path, channels)
    if channels > 1 and len(image.shape) == 3 and len(files) > 1:
        images = [image, *map(_open, files[1:])]
        for other, file in zip(images, files, strict=True):
            check_same_grid(path, image, file, other, "channel")
        return _reading(path, lambda: _joined(images, path))
    needed = "a volume of three dimensions" if channels == 1 else f"{channels} channels, along a fourth axis,"
    if image.shape[3:] != ((channels,) if channels > 1 else ()):
        raise InputError(f"{path} is of shape {times(image.shape)}, where {needed} is needed" if channels == 1 else
                         f"{path} is of shape {times(image.shape)}, where {needed} are needed")
    return image


def _open(path: Path) -> Any:
    nibabel = _nibabel()
    if not path.is_file():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"there is no volume {path}{near_misses(path.name, others)}")
    image = _reading(path, lambda: nibabel.load(path))
    if len(image.shape) > 3:
        image = nibabel.squeeze_image(image)  # axes of length 1 after the third
    if len(image.shape) < 3:
        raise InputError(f"{path} is of shape {times(image.shape)}, where a volume of three dimensions is needed")
    sizes = nibabel.affines.voxel_sizes(image.affine)
    if not (np.isfinite(sizes).all() and abs(np.linalg.det(image.affine[:3, :3])) > 1e-6 * sizes.prod()):
        raise InputError(f"{path} has an affine that gives its voxels no place or size: {np.asarray(image.affine)[:3].tolist()}")
    return image


def _joined(images: list[Any], path: Path) -> Any:
    joined = _nibabel().concat_images(images, check_affines=False)  # they agree to a thousandth of a millimetre
    joined.set_filename(str(path))
    return joined


def _reading(path: object, read: Callable[[], Read]) -> Read:
    try:
        return read()
    except Exception as error:  # a damaged file surfaces as whatever its reader stumbles over
        raise InputError(f"the volume {path} cannot be read: {error}") from error


def check_same_grid(image_path: str | Path, image: Any, mask_path: str | Path, mask: Any, kind: str = "mask") -> None:
    """Raises InputError unless both images have one shape and, to a thousandth of a millimetre, one affine."""
    if image.shape[:3] != mask.shape[:3]:
        raise InputError(f"the {kind} {mask_path} has {times(mask.shape[:3])} voxels, its volume {image_path} {times(image.shape[:3])}; "
                         "they have to be the same")
    difference = np.abs(np.asarray(image.affine) - mask.affine).max()
    if difference > 1e-3:
        raise InputError(f"the affine of the {kind} {mask_path} differs from that of {image_path} by {difference:.3g}; "
                         f"resample the {kind} onto the volume's grid")


@dataclass(frozen=True)
class Grid:
    """What is done to volumes before a network sees them: axes turned to right, anterior, superior; voxels resampled; intensities.

    Voxels that are NaN count as outside: they have no part in means and variances, and are what 0, or the low end of `clip`, is.

    Args:
        spacing: millimetres per voxel along these axes, which the affine of a file tells; None keeps the file's.
        clip: (low, high), mapped to 0 and 1, as is usual for CT; None: the voxels of a channel that are not 0 get mean 0 and variance 1.
    """

    spacing: tuple[float, float, float] | None = None
    clip: tuple[float, float] | None = None

    @classmethod
    def of(cls, config: Mapping) -> Self:
        return cls(*(tuple(value) if (value := config.get(name)) is not None else None for name in ("spacing", "clip")))

    def prepare(self, image: Any, say: Say = say_once) -> Tensor:
        """(C, X, Y, Z) float32. Raises InputError if the file's data are damaged, or infinite somewhere.

        `say` gets what there is to say of NaN, as a logger's `warning` does.
        """
        volume = self.normalize(_voxels(image, 0.0 if self.clip is None else self.clip[0], say))
        if self.spacing is not None:
            volume = F.interpolate(volume[None], self.size(image), mode="trilinear")[0]
        return volume

    def normalize(self, volume: Tensor) -> Tensor:
        if self.clip is not None:
            low, high = self.clip
            return volume.sub_(low).div_(high - low).clamp_(0, 1)
        for channel in volume:
            inside = channel[channel != 0]
            std, mean = torch.std_mean(inside) if inside.numel() > 1 else (torch.ones(()), torch.zeros(()))
            channel.sub_(mean).div_(std.clamp(min=1e-8))
        return volume

    def prepare_mask(self, image: Any, classes: int, path: str | Path, say: Say = say_once) -> Tensor:
        """(1, X, Y, Z) of `label_dtype`. Raises InputError for damaged data and for labels that are not whole numbers below `classes`."""
        labels = _voxels(image, 0.0, say)
        check_labels(labels, classes, path)
        labels = labels.to(label_dtype(classes))
        return labels if self.spacing is None else _nearest(labels, self.size(image))

    def prepare_pair(self, image_path: str | Path, mask_path: str | Path, classes: int, channels: int = 1, say: Say = say_once,
                     ) -> tuple[Tensor, Tensor]:
        """A volume and its mask in files, as `prepare` and `prepare_mask` give them. Raises InputError unless they share one grid."""
        image, mask = open_volume(image_path, channels), open_volume(mask_path)
        check_same_grid(image_path, image, mask_path, mask)
        return self.prepare(image, say), self.prepare_mask(mask, classes, mask_path, say)

    def size(self, image: Any) -> list[int]:
        """Voxels along each axis after resampling."""
        canonical = _canonical(image)
        zooms = _zooms(canonical)
        return [max(1, round(n * zoom / new)) for n, zoom, new in zip(canonical.shape[:3], zooms, self.spacing or zooms, strict=True)]

    def voxel_sizes(self, image: Any) -> tuple[float, ...]:
        """Millimetres per voxel along each axis after resampling: what `spacing` asks for, but for rounding to whole voxels."""
        canonical = _canonical(image)
        lengths = np.array(_zooms(canonical)) * canonical.shape[:3]
        return tuple((lengths / self.size(image)).tolist())

    def write_mask(self, labels: Tensor, image: Any, path: str | Path) -> None:
        """Writes labels (X, Y, Z) on this grid, whole numbers of any type, as a NIfTI file with the shape and affine of `image`."""
        nibabel = _nibabel()
        canonical = _canonical(image)
        if labels.shape != canonical.shape[:3]:
            labels = _nearest(labels[None], canonical.shape[:3])[0]
        there = nibabel.orientations.io_orientation(canonical.affine)
        back = nibabel.orientations.ornt_transform(there, nibabel.orientations.io_orientation(image.affine))
        turned = np.ascontiguousarray(nibabel.orientations.apply_orientation(labels.numpy(), back))
        mask = nibabel.Nifti1Image(turned, image.affine, image.header, dtype=turned.dtype)
        mask.header.set_slope_inter(1, 0)
        with replacing(path) as written:
            nibabel.save(mask, written)


def labels_in(path: str | Path) -> list[float]:
    """The values that occur in the mask at `path`, in ascending order; those that are NaN count as 0, which is said."""
    return _voxels(open_volume(path), 0.0, say_once).unique().tolist()


def _nearest(labels: Tensor, size: list[int] | tuple[int, ...]) -> Tensor:
    """As interpolation with "nearest-exact", of whole numbers of any type."""
    for axis, (old, new) in enumerate(zip(labels.shape[1:], size, strict=True), 1):
        labels = labels.index_select(axis, ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new).long())
    return labels


def _voxels(image: Any, outside: float, say: Say) -> Tensor:
    """(C, X, Y, Z) float32 with `outside` for NaN: only here the file is read beyond its header."""
    path = image.get_filename()
    array = _reading(path, lambda: np.asanyarray(_canonical(image).dataobj))
    if array.dtype.kind not in "biuf":
        raise InputError(f"the volume {path} has voxels of type {array.dtype}, where real numbers are needed")
    with np.errstate(over="ignore"):  # becomes infinite
        array = array.astype(np.float32)
    voxels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)) if array.ndim == 4 else array[None])
    if not voxels.isfinite().all():
        if infinite := int(voxels.isinf().sum()):
            raise InputError(f"the volume {path} has {infinite} voxels that are infinite; give them values, or NaN if they lie outside")
        missing = voxels.isnan()
        say("the volume %s has %d voxels that are NaN; they count as outside, %g", path, int(missing.sum()), outside)
        voxels[missing] = outside
    return voxels


def _zooms(image: Any) -> list[float]:
    """Millimetres per voxel along the axes, as the affine has them, whatever else the header says."""
    units = image.header.get_xyzt_units()[0] if hasattr(image.header, "get_xyzt_units") else "mm"
    return [float(size) * MILLIMETRES.get(units, 1.0) for size in _nibabel().affines.voxel_sizes(image.affine)]


def _canonical(image: Any) -> Any:
    return _nibabel().as_closest_canonical(image)


def _nibabel() -> Any:
    require("reading volumes", "volumes", "nibabel")
    import nibabel
    return nibabel
