"""Average precision of every class of a detector. Imported where a config is of mmdetection."""
import contextlib
import copy
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.evaluation import CocoMetric
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from zoo.measuring.per_class import Row

BOXES = 100  # of a picture, that count


class BoxTable(CocoMetric):
    """COCO's average precision of every class, of boxes and, where they are evaluated, of masks: over IoU of 0.5 to 0.95, at 0.5, at 0.75.

    A table is left in `rows`, in percent, and no metric. Arguments as mmdetection's `CocoMetric`; the annotations have to be in a file.
    """

    rows: list[Row]

    def compute_metrics(self, results: list) -> dict[str, float]:
        truth: Any = self._coco_api
        self.cat_ids = truth.get_cat_ids(cat_names=self.dataset_meta["classes"])
        counts = dict.fromkeys(self.cat_ids, 0)
        for annotation in truth.dataset["annotations"]:
            if annotation["category_id"] in counts and not annotation.get("iscrowd"):
                counts[annotation["category_id"]] += 1
        names = {category["id"]: str(category["name"]) for category in truth.dataset["categories"]}
        self.rows = [{"class": names[number], "boxes": counts[number]} for number in self.cat_ids]
        with tempfile.TemporaryDirectory() as folder:
            files = self.results2json([found for _, found in results], str(Path(folder) / "found"))
            for kind, name in (("bbox", ""), ("segm", "mask_")):
                if kind in self.metrics:
                    self._add(f"{name}ap", self._precision(truth, json.loads(Path(files[kind]).read_text()), kind))
        return {}

    def _precision(self, truth: Any, found: list[dict], kind: str) -> np.ndarray:
        """(IoU, recall, class), NaN for a class without objects."""
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, truth.loadRes(found) if found else _nothing(truth), kind)
            evaluation.params.catIds, evaluation.params.maxDets = self.cat_ids, [BOXES]
            evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][..., 0, 0]
        return np.where(precision < 0, np.nan, precision)

    def _add(self, name: str, precision: np.ndarray) -> None:
        for suffix, of in (("", slice(None)), ("50", slice(0, 1)), ("75", slice(5, 6))):
            for row, value in zip(self.rows, (100 * precision[of].mean((0, 1))).tolist(), strict=True):
                row[f"{name}{suffix}"] = value


def _nothing(truth: Any) -> COCO:
    empty = COCO()
    empty.dataset = {**copy.copy(truth.dataset), "annotations": []}
    empty.createIndex()
    return empty
