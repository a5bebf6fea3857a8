"""What remains of the boxes that an exported RetinaNet gives, in NumPy."""
import numpy as np


def detections(found: np.ndarray, size: tuple[int, int], *, score_thr: float, iou_threshold: float, max_per_img: int,
               ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a RetinaNet sees in one picture of `size` (height, width): boxes (n, 4) in pixels, scores (n,), classes (n,).

    `found` (N, 4 + classes) is the network's. Boxes outside the picture, of no area in it, are left out. Of the boxes of a
    class that overlap by more than `iou_threshold` of their union the one with the best score stays, and of all the
    `max_per_img` best. The toolbox keeps only `nms_pre` candidates of each level before; that makes a difference where more
    of them score above `score_thr`.
    """
    has_area = (found[:, 2:4] > found[:, :2]).all(1, keepdims=True)
    anchors, classes = np.nonzero((found[:, 4:] > score_thr) & has_area)
    scores = found[anchors, 4 + classes]
    order = np.argsort(-scores, kind="stable")
    boxes, scores, classes = found[anchors[order], :4] * ([size[1], size[0]] * 2), scores[order], classes[order]
    kept: list[int] = []
    for i, box in enumerate(boxes):
        rivals = [k for k in kept if classes[k] == classes[i]]
        if len(kept) < max_per_img and not (_overlap(box, boxes[rivals]) > iou_threshold).any():
            kept.append(i)
    return boxes[kept], scores[kept], classes[kept]


def _overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of `box` (4,) with each of `boxes` (n, 4)."""
    sides = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0)
    area = sides.prod(1)
    return area / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - area)
