"""What is measured on held-out data."""
from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class Accuracy(BaseMetric):
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
        classes = len(self.dataset_meta["classes"])
        return {f"top{k}": 100 * hit / images for k, hit in zip(self.topk, hits, strict=True) if k <= classes}

    def evaluate(self, size: int) -> dict[str, float]:
        """The metrics over all ranks; every rank gets them. `size` is the number of images in the dataset."""
        metrics = {f"{self.prefix}/{name}": value for name, value in self.compute_metrics(self.results).items()}
        self.results.clear()
        return metrics
