"""Cutting out objects as a task of the engine: InSPyReNet's loss, scenes with exact masks, and the field's metrics."""
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mmengine.dist import all_reduce
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from zoo.errors import InputError
from zoo.losses import SaliencyPyramidLoss
from zoo.mm.mask_datasets import MaskedPictures, listed_files
from zoo.mm.metrics import Counted
from zoo.mm.networks import create_network, load_whole_or_encoder, plain
from zoo.models.inspyrenet import InSPyReNet, scaled
from zoo.reading.composed import PhotographScenes
from zoo.reading.masks import paired_files, read_picture_mask
from zoo.reading.pictures import PICTURE_SUFFIXES, open_picture, picture_tensor


@MODELS.register_module()
class Cutter(BaseModel):
    """An InSPyReNet, trained by the loss on its pyramid of logits.

    Args:
        name: a registered name, of the family `inspyrenet`.
        args: further arguments of `timm.create_model`.
        consistency: see `zoo.SaliencyPyramidLoss`.
        weights: a file whose weights training starts from: those of the network, or of its encoder alone as a classifier. Read when
            training starts; what evaluates or resumes does not need it.

    Raises InputError for an unknown name or argument, and for another family.
    """

    task = "saliency"

    def __init__(self, name: str, args: Mapping | None = None, consistency: float = 1e-4, weights: str | None = None):
        super().__init__()
        self.name, self.args = name, plain(args or {})
        self.model = create_network(name, self.args)
        if not isinstance(self.model, InSPyReNet):
            raise InputError(f"name={name!r}: it is not of the family inspyrenet, which cuts out objects")
        self.num_classes, self.weights = self.model.num_classes, weights
        self.loss = SaliencyPyramidLoss(consistency)

    def init_weights(self) -> None:
        """Loads `weights`, if there are any; the network has been initialised, and the engine would do so again."""
        if self.weights is not None:
            load_whole_or_encoder(self.model, self.weights)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Tensor | dict | list[dict]:
        """`inputs` (B, C, H, W), in training of sizes that 32 divides, `targets` (B, H, W), 1 where the object is.

        Mode "tensor" gives the logits; "loss" a dict with the scalar `loss`; "predict" one dict per image with `alpha` (H, W), from 0 to 1,
        and `target`.
        """
        match mode:
            case "tensor":
                return self.model(inputs)
            case "loss":
                return {"loss": self.loss(self.model.pyramid(inputs), cast(Tensor, targets)[:, None].to(inputs.dtype))}
            case "predict":
                alphas = scaled(self.model(inputs).float())[:, 0]
                return [{"alpha": alpha, "target": target} for alpha, target in zip(alphas, cast(Tensor, targets), strict=True)]
        raise ValueError(f"unknown mode {mode!r}: it is one of tensor, loss, predict")


@DATASETS.register_module()
class PhotographScenesDataset(MaskedPictures):
    """A digit on a photograph that a package ships, with its exact mask: `zoo.reading.composed.PhotographScenes`.

    Scene i is a pure function of (split, i). Neither digits nor photographs of "train" are in "val".

    Args:
        split: "train" or "val".
        scenes: how many.
        size: pixels on a side.
        args: further arguments of `MaskedPictures`.
    """

    def __init__(self, split: str, scenes: int, size: int = 96, **args):
        super().__init__(["object"], **args)
        self.scenes = PhotographScenes(split, size)
        self.names = [f"scene {i}" for i in range(scenes)]
        self.data_config = {"input_size": (3, size, size), "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        picture, mask = self.scenes.read(index)
        mean, std = (torch.tensor(self.data_config[key])[:, None, None] for key in ("mean", "std"))
        pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        return (pixels - mean) / std, torch.from_numpy(mask.astype(np.uint8))[None]


@DATASETS.register_module()
class CutOutDataset(MaskedPictures):
    """Pictures in `root/SPLIT/images` and masks in `root/SPLIT/masks`, of what is to be cut out, brought to one size without proportion.

    Which mask is a picture's, `zoo.reading.pairs.pair` says. A pixel of the resized mask is of the object if more than half of it was.

    Args:
        root: the folder that holds `train` and `val`.
        split: "train" or "val", or another that `file` lists.
        size: height and width, multiples of 32; recorded in checkpoints.
        mean, std: of every channel, for pixels between 0 and 1; one number for grey pictures.
        object_from: from which value on a mask says that it is the object; the default suits masks of 0 to 255.
        file: name of a CSV in `root`, as `zoo train MODEL DATA` writes it, that lists the pairs in the place of folders.
        args: further arguments of `MaskedPictures`.

    Raises InputError for missing folders, files without partners, sizes that 32 does not divide, and on reading for masks of another size
    than their picture's.
    """

    def __init__(self, root: str, split: str, size: Sequence[int], mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
                 std: Sequence[float] = IMAGENET_DEFAULT_STD, object_from: int = 128, file: str | None = None, **args):
        super().__init__(["object"], **args)
        if len(size) != 2 or any(side < 32 or side % 32 for side in size):
            raise InputError(f"size={tuple(size)}: it is a height and a width, multiples of 32")
        self.files = listed_files(Path(root) / file, split) if file else paired_files(Path(root), split, "masks", PICTURE_SUFFIXES)
        self.names = [str(image) for image, _ in self.files]
        self.object_from = object_from
        self.data_config = {"input_size": (len(mean), *size), "mean": tuple(mean), "std": tuple(std)}

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        path, mask_path = self.files[index]
        config = self.data_config
        height, width = config["input_size"][1:]
        picture = open_picture(path, len(config["mean"])).resize((width, height), Image.Resampling.BICUBIC)
        mask = Image.fromarray(read_picture_mask(mask_path, path) >= self.object_from).convert("L")
        found = np.asarray(mask.resize((width, height), Image.Resampling.BOX)) > 127
        return picture_tensor(picture, config["mean"], config["std"]), torch.from_numpy(found.astype(np.uint8))[None]


def _pysodmetrics() -> Any:
    """Raises InputError where the package is missing; it asks for a NumPy of before 2.3.5, and works with later ones."""
    try:
        return importlib.import_module("py_sod_metrics")
    except ImportError as error:
        raise InputError("measuring objects that are cut out needs the package pysodmetrics; install it with: zoo install-mm, or "
                         "pip install --no-deps pysodmetrics==1.6.2") from error


@METRICS.register_module()
class SaliencyMetrics(Counted):
    """What salient object detection is measured by, of every picture and then averaged over them, as pysodmetrics has it.

    `saliency/MAE`, the mean absolute error; `saliency/S`, the structure measure; `saliency/E`, the mean enhanced alignment, and
    `saliency/F`, the largest F-measure (β² 0.3) of 256 thresholds, of means over pictures; `saliency/wF`, the weighted one. From 0 to 1.
    """

    default_prefix = "saliency"

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        sod = _pysodmetrics()
        for sample in data_samples:
            measures = mae, structure, alignment, f, weighted = (
                sod.MAE(), sod.Smeasure(), sod.Emeasure(), sod.Fmeasure(), sod.WeightedFmeasure())
            alpha, target = ((sample[name].float() * 255).round().byte().cpu().numpy() for name in ("alpha", "target"))
            for measure in measures:
                measure.step(alpha, target)
            numbers = [1.0, mae.get_results()["mae"], structure.get_results()["sm"], weighted.get_results()["wfm"]]
            curves = [alignment.get_results()["em"]["curve"], f.get_results()["fm"]["curve"]]
            self.results.append(torch.tensor(np.concatenate([numbers, *curves]), dtype=torch.float64))

    def compute_metrics(self, results: list[torch.Tensor]) -> dict[str, float]:
        total = sum(results, torch.zeros(4 + 2 * 256, dtype=torch.float64))
        all_reduce(total)
        mae, structure, weighted, *curves = (total[1:] / total[0]).tolist()
        alignment, f = curves[:256], curves[256:]
        return {"MAE": mae, "S": structure, "E": sum(alignment) / 256, "F": max(f), "wF": weighted}
