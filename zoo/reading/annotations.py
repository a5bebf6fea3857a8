"""COCO's annotation files: what their tools need is filled in where it follows from the rest, and what is wrong is said."""
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import InputError, near_misses, times
from zoo.reading.class_names import shown
from zoo.reading.pictures import opening, orientation, seen_size
from zoo.reading.say import say_once

NEEDED = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name"), "annotations": ("image_id", "category_id")}


def complete(content: Any, path: str | Path) -> None:
    """Fills in, in the content of the annotation file at `path`, what annotations may lack: ids, boxes, areas, and that they are no crowds.

    Boxes and areas follow from the segmentation, areas without one from the box. Raises InputError for a file of another kind, for
    annotations of pictures or categories that the file does not have, and for two things of one id or categories of one name.
    """
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in NEEDED):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path} is no annotation file of COCO's kind: it holds {found or 'nothing'}, where lists of "
                         f"{', '.join(NEEDED)} are needed")
    for key, fields in NEEDED.items():
        for number, entry in enumerate(content[key]):
            if missing := [field for field in fields if field not in entry]:
                raise InputError(f"number {number} of the {key} in {path} has no {missing[0]}")
    if not any("id" in annotation for annotation in content["annotations"]):
        for number, annotation in enumerate(content["annotations"], 1):
            annotation["id"] = number
    for key, field in (*((key, "id") for key in NEEDED), ("categories", "name")):
        counts = Counter(entry.get(field) for entry in content[key])
        if repeated := next((value for value, count in counts.items() if count > 1), None):
            raise InputError(f"{counts[repeated]} of the {key} in {path} have the {field} {repeated!r}, where each needs one of its own")
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in images or annotation["category_id"] not in categories:
            what, place = ("category", "category_id") if annotation["image_id"] in images else ("image", "image_id")
            raise InputError(f"annotation {annotation['id']} in {path} is of {what} {annotation[place]!r}, which is not in the file")
        _fill_in(annotation, images[annotation["image_id"]], path)
    _check_boxes([(annotation["bbox"], images[annotation["image_id"]]) for annotation in content["annotations"]], path)


def _check_boxes(boxes: Sequence[tuple[Sequence[float], dict]], path: str | Path) -> None:
    """Raises InputError for boxes in another form than COCO's, which the tools would leave out or cut without a word."""
    small = sum(max(box[2:]) <= 1 for box, _ in boxes)
    beyond = sum(box[0] + box[2] > image["width"] + 1 or box[1] + box[3] > image["height"] + 1 for box, image in boxes)
    if boxes and 2 * max(small, beyond) > len(boxes):
        what = f"{small} are of one pixel at most" if small > beyond else f"{beyond} reach beyond their pictures"
        raise InputError(f"of the {len(boxes)} boxes in {path} {what}: COCO's have left, top, width and height, in pixels")


def _fill_in(annotation: dict, image: dict, path: str | Path) -> None:
    annotation.setdefault("iscrowd", 0)
    if not annotation.get("segmentation"):
        annotation.pop("segmentation", None)  # an empty list is none
    if "bbox" in annotation and "area" in annotation:
        return
    if "segmentation" in annotation:
        from pycocotools import mask as masks

        encoded = compressed(annotation["segmentation"], image["width"], image["height"])
        annotation.setdefault("bbox", masks.toBbox(encoded).tolist())
        annotation.setdefault("area", float(masks.area(encoded)))
    elif "bbox" in annotation:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    else:
        raise InputError(f"annotation {annotation['id']} in {path} has neither a bbox nor a segmentation")


def compressed(segmentation: Any, width: int, height: int) -> Any:
    """A segmentation in any of COCO's forms as compressed run lengths, which pycocotools decodes."""
    from pycocotools import mask as masks

    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = masks.frPyObjects(segmentation, height, width)
    return masks.merge(segmentation) if isinstance(segmentation, list) else segmentation


def check_categories(names: Sequence[str], categories: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Raises InputError unless the categories of the file at `path` have these `names` among them, in the same order.

    The order counts because the tools number classes by it.
    """
    known = [category["name"] for category in categories]
    if missing := [name for name in names if name not in known]:
        raise InputError(f"{path} has no category {missing[0]!r}, which is one of the classes{near_misses(missing[0], known)}; it has "
                         f"{shown(known)}")
    ordered = [name for name in known if name in names]
    if list(names) != ordered:
        raise InputError(f"the classes {shown(names)} are in another order than the categories of {path}, so that names would be taken for "
                         f"each other; write classes=({', '.join(map(repr, ordered[:30]))}{', …' if len(ordered) > 30 else ','})")


def check_size(path: str | Path, width: int, height: int) -> None:
    """Raises InputError unless the picture at `path`, as it is seen, has the size that its annotations are for.

    Boxes are of pictures that are turned upright, as COCO's tools read them; of a picture that is turned without another size it is
    said once in the log `zoo`.
    """
    with opening(path) as opened:
        turn, size = orientation(opened), seen_size(opened)
    if size == (width, height):
        if turn != 1 and (width == height or turn in (2, 3, 4)):
            say_once("%s and others are turned by their EXIF orientation: boxes are taken to be of the pictures as they are seen",
                     Path(path).parent)
        return
    why = (f": it is turned by its EXIF orientation {turn}, and they are of the picture before that; save it without that entry"
           if size == (height, width) and turn != 1 else "")
    raise InputError(f"the picture {path} is of {times(size)} pixels, width by height, and its annotations are of {times((width, height))}"
                     f"{why}")
