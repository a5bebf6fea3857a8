"""What was found in pictures as supervision's `Detections`, which its annotators, trackers, zones and metrics take."""
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.errors import InputError, require
from zoo.predicting.label_maps import Labelled
from zoo.predicting.scenes import Scene, SceneInfo
from zoo.reading.coco import decoded

if TYPE_CHECKING:
    import supervision as sv


def scene_detections(scene: Scene, info: SceneInfo) -> "sv.Detections":
    """The instances that a detector found, or of a segmentor one mask for each class that is there.

    `class_id` are the classes' numbers in COCO's annotations, as in files of `zoo predict`, or of a segmentor the labels; their
    names are in `data` as `class_name`.
    """
    if scene.classes is not None:
        return map_detections(Labelled(scene.path, scene.classes, info.classes))
    assert scene.labels is not None and scene.boxes is not None  # without a map there are instances
    numbers, names = np.array(info.category_ids, int)[scene.labels], np.array(info.classes, str)[scene.labels]
    return _detections(scene.boxes, scene.masks, scene.scores, numbers, names)


def map_detections(labelled: Labelled) -> "sv.Detections":
    """One mask, and the box around it, for each class that is there, the background, which is class 0, among them."""
    require("supervision's detections", "frameworks", "supervision")
    import supervision as sv
    present = np.unique(labelled.labels)
    masks = labelled.labels == present[:, None, None]
    return _detections(sv.mask_to_xyxy(masks) + [0, 0, 1, 1], masks, None, present.astype(int), np.array(labelled.classes, str)[present])


def read_detections(path: str | Path) -> dict[Path, "sv.Detections"]:
    """Those in a JSON file of `zoo predict`, by picture. Pictures in which nothing was found are not in the file.

    Raises InputError for a file that is not there, and for another.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        by_picture: dict[str, list[dict]] = {}
        for record in records:
            by_picture.setdefault(record["file_name"], []).append(record)
        return {Path(picture): _of_records(found) for picture, found in by_picture.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no boxes as `zoo predict DETECTOR … -o NAME.json` writes them: {error!r}") from error


def _of_records(records: list[dict]) -> "sv.Detections":
    boxes = np.array([record["bbox"] for record in records], float)
    masks = np.stack([decoded(record["segmentation"]) for record in records]) if "segmentation" in records[0] else None
    return _detections(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), masks, *(
        np.array([record[key] for record in records]) for key in ("score", "category_id", "category_name")))


def _detections(boxes: np.ndarray, masks: np.ndarray | None, scores: np.ndarray | None, numbers: np.ndarray,
                names: np.ndarray) -> "sv.Detections":
    require("supervision's detections", "frameworks", "supervision")
    import supervision as sv
    return sv.Detections(boxes.astype(np.float32), masks, scores, numbers, data={"class_name": names})
