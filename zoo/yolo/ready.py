"""Ready model files: those of Ultralytics with some rows replaced, by names such as yolo11n-das-seg.yaml."""
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import yaml

from zoo.errors import InputError

FOLDER = Path(__file__).parent / "models"
BASES = ("yolo11", "yolo26")
TASKS = ("seg", "pose", "obb", "cls")
NAME = re.compile(rf"({'|'.join(BASES)})([nslmx]?)-(\w+?)(-(?:{'|'.join(TASKS)}))?")
NECK = 9  # the first row that the files for classification do not share
BACKBONE = "BACKBONE"

Load = Callable[[str | Path], dict[str, Any]]


def names() -> list[str]:
    """The ready files for detection, without a size: yolo11-atconv.yaml and so on."""
    return [f"{base}-{path.stem}.yaml" for base in BASES for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "backbone"]


def model_file(name: str | Path) -> dict[str, Any]:
    """The ready model file of that name, such as "yolo11n-das.yaml", whole, as one would write it to change it.

    Raises InputError where there is none.
    """
    from ultralytics.nn import tasks

    if NAME.fullmatch(Path(name).stem) is None:
        raise InputError(f"{name}: ready model files are {', '.join(names())}, with a size and a task as in yolo11n-das-seg.yaml")
    return tasks.yaml_model_load(name)


def loader_of(original: Load) -> Load:
    """Ultralytics' loader of model files, with the ready ones beside those that it finds."""

    def yaml_model_load(path: str | Path) -> dict[str, Any]:
        match = NAME.fullmatch(Path(path).stem)
        if match is None or Path(path).suffix not in (".yaml", ".yml") or Path(path).is_file():
            return original(path)
        base, size, mechanism, task = match.groups(default="")
        rows = _rows(mechanism)
        if rows is None:
            return original(path)
        if task == "-cls" and max(rows) >= NECK:
            raise InputError(f"{path}: {mechanism} has its place in the neck, which models for classification have not")
        return {**_replaced(original(f"{base}{size}{task}.yaml"), rows), "yaml_file": str(path)}

    return yaml_model_load


def _rows(mechanism: str) -> dict[int, Any] | None:
    file = FOLDER / f"{mechanism}.yaml"
    if file.is_file() and mechanism != "backbone":
        return yaml.safe_load(file.read_text())
    if timm.is_model(mechanism):
        return yaml.safe_load((FOLDER / "backbone.yaml").read_text().replace(BACKBONE, mechanism))
    return None


def _replaced(model: dict[str, Any], changes: dict[int, Any]) -> dict[str, Any]:
    """`model` with other rows in the place of some: a list of rows, or the name of a row whose arguments stay.

    Rows name each other by their numbers in `model`; a row that several take the place of is the last of them.
    """
    model = deepcopy(model)
    parts, last, count = [], {}, 0
    for number, row in enumerate(model["backbone"] + model["head"]):
        change = changes.get(number, [row])
        new = [[*row[:2], change, row[3]]] if isinstance(change, str) else change
        parts.append(new)
        count += len(new)
        last[number] = count - 1

    def renumber(source: int) -> int:
        return source if source < 0 else last[source]

    for row in (row for part in parts for row in part):
        row[0] = [renumber(source) for source in row[0]] if isinstance(row[0], list) else renumber(row[0])
    split = len(model["backbone"])
    return {**model, "backbone": sum(parts[:split], []), "head": sum(parts[split:], [])}
