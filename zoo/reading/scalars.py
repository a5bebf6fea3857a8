"""The curves of a training, from the scalars.json files that the engine leaves in its work dir."""
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

Points = list[tuple[float, float]]
STAMP = "%Y%m%d_%H%M%S"  # of the folder of a run
BESIDE = {"data_time", "time", "memory", "epoch", "iter", "step"}  # what is logged beside numbers of the training itself


@dataclass
class Scalars:
    """What was logged, by name, as points (step, value); NaN and infinity are kept.

    `train` at iterations counted from 1, `held_out` at epochs, or at iterations where the training counts those. `epochs` gives the epoch
    of an iteration; `begun` when the first run began, and those that went on from it.
    """

    train: dict[str, Points] = field(default_factory=dict)
    held_out: dict[str, Points] = field(default_factory=dict)
    epochs: dict[float, int] = field(default_factory=dict)
    begun: list[datetime] = field(default_factory=list)


def read_scalars(work_dir: Path) -> Scalars:
    """What the last training in `work_dir` logged, as if it had never been interrupted.

    Where a run went on from an earlier checkpoint, what the run before had logged beyond that is left out.
    """
    scalars, last = Scalars(), 0
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        try:
            begun = datetime.strptime(path.parent.parent.name, STAMP)
        except ValueError:  # another's folder
            continue
        config = path.with_name("config.py")
        if config.is_file() and "resume = False" in config.read_text(encoding="utf-8").splitlines():
            scalars, last = Scalars(), 0
        scalars.begun.append(begun)
        for line in _lines(path):
            values = {name: value for name, value in line.items() if name not in BESIDE and isinstance(value, int | float)}
            if "iter" not in line:
                _add(scalars.held_out, values, line["step"])
                continue
            step, epoch = line["iter"], line.get("epoch")
            if step <= last:
                for points in scalars.train.values():
                    _cut(points, step)
                for points in scalars.held_out.values():
                    _cut(points, epoch or step)
            last = step
            _add(scalars.train, values, step)
            if epoch is not None:
                scalars.epochs[step] = epoch
    return scalars


def _lines(path: Path) -> Iterator[dict]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off where the process was killed
            continue
        if isinstance(line, dict) and "step" in line:
            yield line


def _add(curves: dict[str, Points], values: Mapping[str, float], step: float) -> None:
    for name, value in values.items():
        points = curves.setdefault(name, [])
        _cut(points, step)  # evaluated again
        points.append((step, value))


def _cut(points: Points, step: float) -> None:
    """Removes the points from `step` on."""
    while points and points[-1][0] >= step:
        points.pop()
