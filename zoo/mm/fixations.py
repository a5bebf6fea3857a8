"""Fixation prediction as a task of the engine: network, data and metrics."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, cast

import torch
from mmengine.dist import all_reduce
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor
from torch.utils.data import Dataset

from zoo.errors import InputError, near_misses
from zoo.fixations import FixationDivergenceLoss, FixationLoss
from zoo.measuring.fixations import measured
from zoo.mm.datasets import Sample
from zoo.mm.metrics import Counted
from zoo.mm.networks import create_network, freeze_but, load_whole_or_encoder, plain
from zoo.models.msinet import MEANS
from zoo.predicting.fixations import cut_back
from zoo.reading.fixations import fitted, fitted_points, read_listed, read_map, read_points
from zoo.reading.masks import check_split, paired_files
from zoo.reading.pictures import PICTURE_SUFFIXES, open_picture, picture_tensor

LOSSES = {"divergence": FixationDivergenceLoss, "combined": FixationLoss}
NAMES = ("kl", "cc", "sim", "nss", "auc")


@MODELS.register_module()
class FixationPredictor(BaseModel):
    """A network that says where people look in a picture, such as `msinet` or `sum`.

    Args:
        name: a registered name.
        args: further arguments of `timm.create_model`, for example `encoder`, `dim`, or of `sum` the `condition` of pictures without one.
        loss: "divergence", `zoo.FixationDivergenceLoss`, or "combined", `zoo.FixationLoss`; or a dict of that as `type` and arguments.
        weights: a file whose weights training starts from: those of the network, by its own names or those it was published with, or of
            its encoder alone. Read when training starts.
        freeze: the encoder does not learn.

    Raises InputError for an unknown name, loss, or argument, and for a network of another task.
    """

    task = "fixations"

    def __init__(self, name: str, args: Mapping | None = None, loss: str | Mapping = "divergence", weights: str | None = None,
                 freeze: bool = False):
        super().__init__()
        self.name, self.args = name, plain(args or {})
        self.model = create_network(name, self.args)
        if getattr(self.model, "task", None) != self.task:
            raise InputError(f"{name} does not say where people look; msinet and sum do")
        described = {"type": loss} if isinstance(loss, str) else dict(loss)
        kind = described.pop("type", None)
        if kind not in LOSSES:
            raise InputError(f"there is no loss {kind!r} of fixations; {' and '.join(LOSSES)} are known{near_misses(str(kind), LOSSES)}")
        try:
            self.loss = LOSSES[kind](**described)
        except TypeError as error:
            raise InputError(f"the loss {kind} does not take {described}: {error}") from error
        self.num_classes = self.model.num_classes
        self.weights, self.freeze = weights, freeze
        self.train()

    def init_weights(self) -> None:
        """Loads `weights`, if there are any; the network has been initialised, and the engine would do so again."""
        if self.weights is not None:
            load_whole_or_encoder(self.model, self.weights)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze and mode:
            freeze_but(self.model.encoder)
        return self

    def forward(self, inputs: Tensor, density: Tensor | None = None, fixations: Tensor | None = None, condition: Tensor | None = None,
                mode: str = "tensor") -> Tensor | dict | list[dict]:
        """`inputs` (B, C, H, W), `density` and `fixations` (B, 1, H, W), in mode "predict" of the pictures' own size; `condition` (B,),
        the kind of each picture, if the data tells kinds and the network knows any.

        Mode "tensor" gives the maps (B, 1, H, W); "loss" a dict with the scalar `loss`; "predict" one dict per picture with `saliency`,
        (H, W), cut back to the picture, `density`, and `fixations` if there are any.
        """
        match mode:
            case "tensor":
                return self._maps(inputs, condition)
            case "loss":
                return {"loss": self.loss(self._maps(inputs, condition).float(), cast(Tensor, density), fixations)}
            case "predict":
                answers, known = self._maps(inputs, condition).float().cpu(), {"density": density, "fixations": fixations}
                known = {name: maps for name, maps in known.items() if maps is not None}
                return [{"saliency": cut_back(answer[0], known["density"].shape[2:]), **{name: maps[i, 0] for name, maps in known.items()}}
                        for i, answer in enumerate(answers)]
        raise ValueError(f"unknown mode {mode!r}: it is one of tensor, loss, predict")

    def _maps(self, inputs: Tensor, condition: Tensor | None) -> Tensor:
        if condition is None:
            return self.model(inputs)
        if not hasattr(self.model, "conditions"):
            raise InputError(f"{self.name} knows no kinds of pictures; leave the data's `conditions` out, or take sum")
        return self.model(inputs, condition)


@DATASETS.register_module()
class FixationDataset(Dataset):
    """Pictures in `root/SPLIT/images`, maps of fixations in `root/SPLIT/maps`, and, if there are any, fixated pixels in `…/fixations`.

    Which map is a picture's, `zoo.reading.pairs.pair` says. For training all are `zoo.reading.fixations.fitted` into `size`; for evaluation
    pictures are, and maps stay as they are, so that one picture at once is read.

    Args:
        root: the folder that holds `train` and `val`.
        split: "train" or "val", or another that `file` lists.
        size: height and width of what the network sees, multiples of 8; recorded in checkpoints.
        mean, std: of every channel, for pixels between 0 and 1; default: those of `msinet`.
        fit_maps: maps are fitted, too; default: for "train".
        flip: the probability of mirroring a sample.
        conditions: kinds of pictures, numbers, by the names of folders; of a picture that of the innermost of its folders that is named.
        file: name of a CSV in `root`, as `zoo train MODEL DATA` writes it, that lists files in the place of folders.

    Raises InputError for missing folders, files without partners, pictures in no folder that `conditions` names, and on reading for maps
    of another size than their picture's.
    """

    def __init__(self, root: str, split: str, size: Sequence[int], mean: Sequence[float] = tuple(m / 255 for m in MEANS),
                 std: Sequence[float] = (1 / 255,) * 3, fit_maps: bool | None = None, flip: float = 0.0, file: str | None = None,
                 conditions: Mapping[str, int] | None = None):
        self.metainfo = {"classes": ["fixations"]}
        self.data_config = {"input_size": (len(mean), *size), "mean": tuple(mean), "std": tuple(std)}
        self.fit_maps, self.flip = split == "train" if fit_maps is None else fit_maps, flip
        if file:
            self.files = read_listed(Path(root) / file, split)
        else:
            check_split(split)
            pairs = paired_files(Path(root), split, "maps", PICTURE_SUFFIXES)
            known = (Path(root) / split / "fixations").is_dir()
            points = dict(paired_files(Path(root), split, "fixations", PICTURE_SUFFIXES)) if known else {}
            self.files = [(picture, looked, points.get(picture)) for picture, looked in pairs]
        self.names = [str(picture) for picture, *_ in self.files]
        self.conditions = None if conditions is None else [_kind(picture, conditions) for picture, *_ in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, sample: Sample) -> dict:
        path, looked, pointed = self.files[sample.index]
        channels, *size = self.data_config["input_size"]
        picture = open_picture(path, channels)
        density = read_map(looked, path, picture.size)
        item = {"inputs": picture_tensor(fitted(picture, size), self.data_config["mean"], self.data_config["std"]),
                "density": picture_tensor(fitted(density, size, 0) if self.fit_maps else density, (0.0,), (1.0,))}
        if pointed is not None:
            points = read_points(pointed, path, picture.size)
            item["fixations"] = (fitted_points(points, size) if self.fit_maps else points)[None]
        if self.flip and torch.rand((), generator=torch.Generator().manual_seed(sample.seed)) < self.flip:
            item = {name: value.flip(-1) for name, value in item.items()}
        if self.conditions is not None:
            item["condition"] = torch.tensor(self.conditions[sample.index])
        return item


def _kind(picture: Path, conditions: Mapping[str, int]) -> int:
    kind = next((conditions[name] for name in reversed(picture.parts[:-1]) if name in conditions), None)
    if kind is None:
        raise InputError(f"{picture} lies in none of the folders that conditions names: {', '.join(conditions)}")
    return kind


@METRICS.register_module()
class FixationMetrics(Counted):
    """`zoo.measuring.fixations.measured` of every picture, at its own size, averaged: `fixations/kl`, `cc`, `sim`, `nss` and `auc`.

    The last two over the pictures of which fixated pixels are known, if there are any.
    """

    default_prefix = "fixations"

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            found = measured(sample["saliency"], sample["density"].cpu(), sample["fixations"].cpu() if "fixations" in sample else None)
            values = torch.tensor([found.get(name, 0.0) for name in NAMES], dtype=torch.float64)
            self.results.append(torch.stack([values, torch.tensor([float(name in found) for name in NAMES], dtype=torch.float64)]))

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        total = sum(results, torch.zeros(2, len(NAMES), dtype=torch.float64))
        all_reduce(total)
        return {name: value / count for name, value, count in zip(NAMES, *total.tolist(), strict=True) if count}
