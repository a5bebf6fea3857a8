"""`zoo train MODEL DATA` on small data of every kind, from random weights, against what it has to reach; writes own_data.md beside it.

    python -m benchmarks.own_data                    # all: about ten minutes on two quiet cores
    python -m benchmarks.own_data crops volumes      # some; the others' rows stay
"""
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from PIL import Image

from zoo.measuring.model_benchmark import cpu_name
from zoo.reading.digits import Digits, grey_scene, write_digit_scenes

TABLE = Path(__file__).with_suffix(".md")
ROWS = "<!-- rows: "


class Goal(NamedTuple):
    """What is trained on what `write` puts into a folder, the metric that counts, and what it has to reach."""

    title: str
    model: str
    write: Callable[[Path], None]
    metric: str
    least: float


def write_crops(root: Path) -> None:
    from skimage import data

    random = np.random.default_rng(0)
    for name in ("astronaut", "coffee", "chelsea"):
        photograph = getattr(data, name)()
        (root / name).mkdir(parents=True)
        for i in range(200):
            side = int(random.integers(56, 120))
            top, left = (int(random.integers(length - side)) for length in photograph.shape[:2])
            crop = Image.fromarray(photograph[top:top + side, left:left + side])
            crop.resize((64, 64)).save(root / name / f"{i:03d}.jpg", quality=90)


def write_digits(root: Path) -> None:
    for split in ("train", "val"):
        digits = Digits(split)
        for i in range(len(digits)):
            picture, label = digits.read(i)
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{i:04d}.png")


def write_masks(root: Path) -> None:
    for number, (split, scenes) in enumerate((("train", 400), ("val", 80))):
        digits = Digits(split)
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for i in range(scenes):
            picture, labels = grey_scene(digits, 64, np.random.default_rng((number, i)))
            Image.fromarray((picture * 255).astype(np.uint8)).save(root / split / "images" / f"{i:03d}.png")
            Image.fromarray(labels).save(root / split / "masks" / f"{i:03d}.png")


def write_boxes(root: Path) -> None:
    write_digit_scenes(root, train=600, val=100)


def write_spheres(root: Path, count: int = 20, side: int = 32) -> None:
    """A task of the Decathlon's form: volumes of noise with a dim and a bright sphere."""
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"))
    named = []
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        labels, volume = np.zeros([side] * 3, np.uint8), random.normal(100, 15, [side] * 3)
        for label in (1, 2):
            centre, radius = random.uniform(side / 4, 3 * side / 4, 3), random.uniform(side / 8, side / 4.5)
            sphere = (((grid - centre[:, None, None, None]) ** 2).sum(0) < radius**2) & (labels == 0)
            labels[sphere] = label
            volume[sphere] += 40 * label
        pair = [f"./{folder}/spheres_{i:03d}.nii.gz" for folder in ("imagesTr", "labelsTr")]
        for name, values in zip(pair, (volume.astype(np.float32), labels), strict=True):
            nibabel.save(nibabel.Nifti1Image(values, np.diag([1.5, 1.5, 1.5, 1.0])), root / name)
        named.append(dict(zip(("image", "label"), pair, strict=True)))
    described = {"labels": {"0": "background", "1": "dim", "2": "bright"}, "modality": {"0": "MRI"}, "training": named, "test": []}
    (root / "dataset.json").write_text(json.dumps(described))


GOALS = {
    "crops": Goal("200 crops of each of 3 photographs", "biformer_nano", write_crops, "accuracy/top1", 95.0),
    "digits": Goal("1437 digits in class folders", "biformer_nano", write_digits, "accuracy/top1", 97.0),
    "masks": Goal("400 scenes of digits, pictures and masks", "attention_unet_nano", write_masks, "iou/mean", 80.0),
    "boxes": Goal("600 scenes of digits, COCO's JSON", "biformer_nano", write_boxes, "coco/bbox_mAP_50", 0.80),
    "volumes": Goal("20 volumes of spheres, dataset.json", "attention_unet3d_nano", write_spheres, "dice/mean", 90.0),
}


def run(name: str, goal: Goal, folder: Path) -> dict:
    """The row of a goal; the program's own lines go to the screen."""
    from zoo.mm import evaluate

    data, work_dir = folder / name, folder / f"{name}_run"
    goal.write(data)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "zoo", "train", goal.model, data, "--work-dir", work_dir], check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    best, = work_dir.glob("best_*.pth")
    value = evaluate(work_dir / "config.py", best)[goal.metric]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"title": goal.title, "model": goal.model, "metric": goal.metric, "value": round(float(value), 3), "least": goal.least,
            "seconds": round(seconds), "cpu_seconds": round(used), "load": round(os.getloadavg()[1], 1)}


def write_table(rows: dict[str, dict]) -> None:
    cores = len(os.sched_getaffinity(0))
    lines = [
        "# One's own data, in one command", "",
        f"`zoo train MODEL DATA` from random weights, without further arguments, on {cores} cores of {cpu_name()}, "
        f"{platform.python_implementation()} {platform.python_version()}, torch {torch.__version__}. Each row is the best checkpoint on "
        "the part for validation. `make own-data` measures it again.", "",
        "| data | model | metric | needed | reached | wall time | CPU time | load |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {row['title']} | `{row['model']}` | {row['metric']} | {row['least']:g} | {row['value']:g} | {row['seconds']} s | "
              f"{row['cpu_seconds']} s | {row['load']} |" for row in rows.values()]
    lines += ["", "Load is how many processes wanted a core meanwhile, on average over five minutes: with more than there are cores, the "
              "wall time says little and the CPU time more.", "", f"{ROWS}{json.dumps(rows)} -->"]
    TABLE.write_text("\n".join(lines) + "\n")


def main(names: list[str]) -> int:
    kept = next((line for line in TABLE.read_text().splitlines() if line.startswith(ROWS)), None) if TABLE.exists() else None
    rows = json.loads(kept.removeprefix(ROWS).removesuffix(" -->")) if kept else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or GOALS:
            rows[name] = run(name, GOALS[name], Path(folder))
            rows = {name: rows[name] for name in GOALS if name in rows}
            print(json.dumps(rows[name]), flush=True)
            write_table(rows)
    failed = [name for name in names or GOALS if rows[name]["value"] < rows[name]["least"]]
    print(*(f"{name} did not reach {GOALS[name].least:g}" for name in failed), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
