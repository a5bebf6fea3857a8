"""COCO's annotations read for mmdetection, with what is wrong with them said, and numbers of every class. Imported where a config is of
mmdetection."""
import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from pycocotools import coco
from pycocotools.cocoeval import COCOeval

from zoo.errors import InputError, near_misses
from zoo.measuring.per_class import Row
from zoo.mm import toolbox_pictures  # noqa: F401  registered so
from zoo.reading.annotations import check_categories, check_size, complete

BOXES = 100  # of a picture, that count


class CompleteCOCO(COCO):
    """COCO's tools on a file that may lack what follows from the rest, see `zoo.reading.annotations.complete`."""

    def __init__(self, annotation_file: str):
        if not Path(annotation_file).is_file():
            folder = Path(annotation_file).parent
            others = [other.name for other in folder.iterdir()] if folder.is_dir() else []
            raise InputError(f"there is no annotation file {annotation_file}{near_misses(Path(annotation_file).name, others)}")
        self.path = annotation_file
        try:
            super().__init__(annotation_file)
        except (ValueError, AssertionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the annotation file {annotation_file} cannot be read: {error}") from error

    def createIndex(self) -> None:  # noqa: N802  its name in pycocotools
        complete(self.dataset, self.path)
        super().createIndex()

    def get_cat_ids(self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()) -> list[int]:
        if cat_names:
            check_categories(cat_names, self.dataset["categories"], self.path)
        return super().get_cat_ids(cat_names, sup_names, cat_ids)


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdetection's CocoDataset, whose place it takes, of files that may lack what follows from the rest.

    Raises InputError where the classes are not among the file's categories in their order, for pictures that are missing or of another
    size than the file says, and for an annotation without a segmentation where the pipeline loads masks.
    """

    COCOAPI = CompleteCOCO

    def load_data_list(self) -> list[dict]:
        listed = super().load_data_list()
        if missing := [item["img_path"] for item in listed if not Path(item["img_path"]).is_file()]:
            raise InputError(f"{len(missing)} of the {len(listed)} pictures of {self.ann_file} are missing, such as {missing[0]}")
        if any(getattr(step, "with_mask", False) for step in self.pipeline.transforms):
            for item in listed:
                if any("mask" not in instance for instance in item["instances"]):
                    raise InputError(f"an annotation of {item['img_path']} in {self.ann_file} has no segmentation, which a network that "
                                     "finds masks is trained on; one that finds boxes only, such as RetinaNet, takes these data")
        return listed

    def prepare_data(self, idx: int) -> Any:
        item = self.get_data_info(idx)
        check_size(item["img_path"], item["width"], item["height"])
        return self.pipeline(item)


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """mmdetection's CocoMetric, whose place it takes, of files that may lack what follows from the rest."""

    def __init__(self, ann_file: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.ann_file = ann_file
        if ann_file is not None:
            self._coco_api = CompleteCOCO(ann_file)


class BoxTable(CheckedCocoMetric):
    """COCO's average precision of every class, of boxes and, where they are evaluated, of masks: over IoU of 0.5 to 0.95, at 0.5, at 0.75.

    A table is left in `rows`, in percent, and no metric. Arguments as mmdetection's `CocoMetric`; the annotations have to be in a file.
    """

    rows: list[Row]

    def compute_metrics(self, results: list) -> dict[str, float]:
        truth: Any = self._coco_api
        self.cat_ids = truth.get_cat_ids(cat_names=cast(dict, self.dataset_meta)["classes"])
        counts = dict.fromkeys(self.cat_ids, 0)
        for annotation in truth.dataset["annotations"]:
            if annotation["category_id"] in counts and not annotation.get("iscrowd"):
                counts[annotation["category_id"]] += 1
        names = {category["id"]: str(category["name"]) for category in truth.dataset["categories"]}
        self.rows = [{"class": names[number], "boxes": counts[number]} for number in self.cat_ids]
        with tempfile.TemporaryDirectory() as folder:
            files = self.results2json([found for _, found in results], str(Path(folder) / "found"))
            kinds: tuple[tuple[Literal["bbox", "segm"], str], ...] = (("bbox", ""), ("segm", "mask_"))
            for kind, name in kinds:
                if kind in self.metrics:
                    self._add(f"{name}ap", self._precision(truth, json.loads(Path(files[kind]).read_text()), kind))
        return {}

    def _precision(self, truth: Any, found: list[dict], kind: Literal["bbox", "segm"]) -> np.ndarray:
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


def _nothing(truth: Any) -> coco.COCO:
    empty: Any = coco.COCO()
    empty.dataset = {**copy.copy(truth.dataset), "annotations": []}
    empty.createIndex()
    return empty
