"""What is measured on held-out data."""
from collections.abc import Sequence
from typing import cast

import torch
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from zoo.measuring.restoration import measured
from zoo.reading.shrinking import enlarge


class Counted(BaseMetric):
    """Base of metrics whose `results` are tensors of counts, summed over batches and ranks.

    Ranks may hold different numbers of images. Subclasses give `process`, and `compute_metrics` of that list.
    """

    def evaluate(self, size: int) -> dict[str, float]:
        """The metrics over all ranks; every rank gets them. `size` is the number of images in the dataset."""
        metrics = {f"{self.prefix}/{name}": value for name, value in self.compute_metrics(self.results).items()}
        self.results.clear()
        return metrics


@METRICS.register_module()
class Accuracy(Counted):
    """Share of images, in percent, whose class is among the k with the highest scores, as `accuracy/top<k>`.

    Hits and images are counted per rank and summed over the ranks, so that ranks may hold different numbers of images.
    Each k in `topk` that exceeds the number of classes is left out. Where the dataset's `metainfo` has `scored`, indices of some of
    the classes, the others' scores do not count, as is usual for ImageNet-A and -R.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5)):
        super().__init__()
        self.topk = tuple(topk)

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        scores = torch.stack([sample["scores"] for sample in data_samples])
        targets = torch.stack([sample["target"] for sample in data_samples])
        if scored := (self.dataset_meta or {}).get("scored"):
            others = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
            others[scored] = False
            scores = scores.masked_fill(others, -torch.inf)
        ranking = scores.topk(min(max(self.topk), scores.shape[1])).indices
        hits = ranking == targets[:, None]
        self.results.append(torch.tensor([len(targets), *(hits[:, :k].sum().item() for k in self.topk)], dtype=torch.int64))

    def compute_metrics(self, results: list[torch.Tensor]) -> dict[str, float]:
        counts = sum(results, torch.zeros(1 + len(self.topk), dtype=torch.int64))
        all_reduce(counts)
        images, *hits = counts.tolist()
        classes = len(cast(dict, self.dataset_meta)["classes"])
        return {f"top{k}": 100 * hit / images for k, hit in zip(self.topk, hits, strict=True) if k <= classes}


@METRICS.register_module()
class Restoration(Counted):
    """How close restored pictures come to the true ones, see `zoo.measuring.restoration`: the means over the pictures.

    `restoration/psnr` and `restoration/ssim` of luminance, `psnr_rgb` and `ssim_rgb` of all channels, and `psnr_bicubic`, that of bicubic
    interpolation of the same small pictures.
    """

    default_prefix = "restoration"
    names = ("psnr", "ssim", "psnr_rgb", "ssim_rgb", "psnr_bicubic")

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            given, restored, target = (sample[name].cpu() for name in ("given", "restored", "target"))
            scale = target.shape[1] // given.shape[1]
            found = {**measured(restored, target, scale), "psnr_bicubic": measured(enlarge(given, scale), target, scale)["psnr"]}
            self.results.append(torch.tensor([1.0, *(found[name] for name in self.names)], dtype=torch.float64))

    def compute_metrics(self, results: list[torch.Tensor]) -> dict[str, float]:
        total = sum(results, torch.zeros(1 + len(self.names), dtype=torch.float64))
        all_reduce(total)
        return dict(zip(self.names, (total[1:] / total[0]).tolist(), strict=True))


@METRICS.register_module()
class MeanIoU(Counted):
    """Intersection over union of every class in percent, over the pixels of all images, as `iou/CLASS`, and `iou/mean`.

    Classes that occur neither in the targets nor in the predictions are left out.
    """

    default_prefix = "iou"

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        classes = len(cast(dict, self.dataset_meta)["classes"])
        for sample in data_samples:
            pairs = sample["target"].flatten() * classes + sample["labels"].flatten()
            self.results.append(torch.bincount(pairs.cpu(), minlength=classes**2).view(classes, classes))

    def compute_metrics(self, results: list[torch.Tensor]) -> dict[str, float]:
        names = cast(dict, self.dataset_meta)["classes"]
        confusion = sum(results, torch.zeros(len(names), len(names), dtype=torch.int64))
        all_reduce(confusion)
        hits, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        return _with_mean({name: 100 * hit / of for name, hit, of in zip(names, hits.tolist(), union.tolist(), strict=True) if of})


@METRICS.register_module()
class MeanDice(Counted):
    """MONAI's Dice of every class but the first, the background, in percent, averaged over images, as `dice/CLASS` and `dice/mean`.

    An image counts for the classes that its target holds.
    """

    default_prefix = "dice"

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        from monai.metrics import compute_dice

        classes = len(cast(dict, self.dataset_meta)["classes"])
        for sample in data_samples:
            one_hot = [_one_hot(sample[name], classes) for name in ("labels", "target")]
            dice = compute_dice(*one_hot, include_background=False)[0].double().cpu()
            self.results.append(torch.stack([dice.nan_to_num(0.0), dice.isfinite().double()]))

    def compute_metrics(self, results: list[torch.Tensor]) -> dict[str, float]:
        names = cast(dict, self.dataset_meta)["classes"][1:]
        total = sum(results, torch.zeros(2, len(names), dtype=torch.float64))
        all_reduce(total)
        return _with_mean({name: 100 * dice / images for name, dice, images in zip(names, *total.tolist(), strict=True) if images})


def _one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """(*sizes) → (1, classes, *sizes)."""
    return (labels[None] == torch.arange(classes, device=labels.device).view(-1, *[1] * labels.ndim))[None]


def _with_mean(values: dict[str, float]) -> dict[str, float]:
    return {**values, "mean": sum(values.values()) / max(1, len(values))}
