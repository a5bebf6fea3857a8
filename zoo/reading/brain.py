"""The MNI152 brain that nilearn ships, with its grey and white matter: volumes with masks that nothing has to be downloaded for."""
import torch
from torch import Tensor

from zoo.errors import require
from zoo.reading.masks import check_split
from zoo.reading.volumes import Grid

MATTER = ("background", "grey matter", "white matter")


def read_hemisphere(split: str, resolution: int = 2) -> tuple[Tensor, Tensor]:
    """The T1 template's left hemisphere for "train", the right for "val": (1, X, Y, Z) float32, and labels (1, X, Y, Z) uint8.

    A voxel is of the likeliest of grey matter, white matter, and neither, by the template's own maps. The template is the
    symmetric one: the hemispheres are nearly mirror images.

    Args:
        split: "train" or "val".
        resolution: millimetres per voxel, 1 or more.

    Raises InputError for another split, and without nilearn.
    """
    check_split(split)
    require("MNI152Dataset", "volumes", "nilearn")
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    image = load_mni152_template(resolution)
    grey, white = (torch.from_numpy(load(resolution).get_fdata()) for load in (load_mni152_gm_template, load_mni152_wm_template))
    volume = Grid.of({}).prepare(image)
    labels = torch.stack([1 - grey - white, grey, white]).argmax(0, keepdim=True).to(torch.uint8)
    across = image.affine[0, 0] * torch.arange(volume.shape[1]) + image.affine[0, 3]  # millimetres to the right of the middle
    here = across < 0 if split == "train" else across > 0
    return volume[:, here], labels[:, here]
