"""Numbers of every class of a config's test data, gathered beside the config's metrics."""
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric

from zoo.errors import InputError
from zoo.measuring import class_tables, per_class
from zoo.measuring.per_class import Row
from zoo.mm.config import COCO_METRICS


class ClassTable(BaseMetric):
    """Base of metrics that leave a table with a row for each class in `rows`, on every rank.

    Ranks may hold different numbers of images. Subclasses give `process`, which adds to `results`, and `fill`.
    """

    rows: list[Row]
    default_prefix = ""  # names are whole

    def evaluate(self, size: int) -> dict[str, float]:
        """What there is to say of all classes together. `size` is the number of images in the dataset."""
        results = [result for found in all_gather_object(self.results) for result in found]
        self.results.clear()
        self.rows, said = self.fill(results)
        return said

    def fill(self, results: list) -> tuple[list[Row], dict[str, float]]:
        raise NotImplementedError

    def compute_metrics(self, results: list) -> dict[str, float]:
        raise NotImplementedError  # the engine's own way, which `evaluate` does not go

    @property
    def names(self) -> list[str]:
        return [str(name) for name in cast(dict, self.dataset_meta)["classes"]]


class ClassificationTable(ClassTable):
    """`zoo.measuring.class_tables.classes`, and the expected calibration error, `calibration/ece` in percent."""

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            scores = sample["scores"].float().cpu().numpy()
            if scored := cast(dict, self.dataset_meta).get("scored"):  # as the metric has it
                scores = np.where(np.isin(np.arange(len(scores)), scored), scores, -np.inf)
            self.results.append((int(sample["target"]), int(scores.argmax()), float(scores.max())))

    def fill(self, results: list) -> tuple[list[Row], dict[str, float]]:
        targets, answers, confidences = (np.array(values) for values in zip(*results, strict=True))
        error = class_tables.calibration_error(confidences, targets == answers)
        return class_tables.classes(targets, answers, self.names), {"calibration/ece": error}


class LabelTable(ClassTable):
    """`zoo.measuring.class_tables.areas` of pictures, `volumes` of volumes: by the items' `spacing`, in millimetres."""

    def process(self, data_batch: object, data_samples: Sequence[Any]) -> None:
        for sample in data_samples:
            if "labels" in sample:
                target, answer, spacing = sample["target"], sample["labels"], sample.get("spacing")
            else:  # of mmsegmentation
                target, answer, spacing = *(sample[key]["data"][0] for key in ("gt_sem_seg", "pred_sem_seg")), None
            target, answer = target.cpu().numpy(), answer.cpu().numpy()
            if target.ndim == 2:
                self.results.append(per_class.confusion(target, answer, len(self.names)))
            else:
                spacing = cast(Any, spacing).tolist()
                self.results.append((per_class.overlap(target, answer, len(self.names), spacing),
                                     class_tables.surface_dice(target, answer, len(self.names), spacing)))

    def fill(self, results: list) -> tuple[list[Row], dict[str, float]]:
        if isinstance(results[0], tuple):
            overlaps, surfaces = zip(*results, strict=True)
            return class_tables.volumes(overlaps, surfaces, self.names), {}
        return class_tables.areas(np.sum(results, axis=0), self.names), {}


def class_table(config: Config) -> BaseMetric:
    """The metric that fills the table for a config's test data, in its `rows`. Raises InputError where there is none."""
    toolbox = config.get("default_scope")
    if toolbox == "mmdet":
        from zoo.mm.mmdet_parts import BoxTable

        evaluators = config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
        described = next((dict(each) for each in evaluators if each.get("type") in COCO_METRICS and each.get("ann_file")), None)
        if described is None:
            raise InputError(f"numbers of every class need a CocoMetric with an ann_file as test_evaluator; {config.filename} has none")
        return BoxTable(**{key: value for key, value in described.items() if key not in ("type", "_scope_")})
    if toolbox == "mmseg" or config.model.type == "Segmentor":
        return LabelTable()
    if config.model.type == "ImageClassifier":
        return ClassificationTable()
    raise InputError(f"there are no numbers of every class for the model {config.model.type}")
