"""Ready model files of `zoo.yolo`, trained from random weights on scenes of digits; writes yolo.md beside it.

    python -m benchmarks.yolo                            # all, size n: goes on where it was stopped
    python -m benchmarks.yolo yolo11n.yaml yolo11n-das.yaml

Plain yolo11n is trained first, in the same way, if it has not been. No network is asked for.
"""
import json
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}  # read when Ultralytics is imported
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())

import torch
import ultralytics
from ultralytics import YOLO

import zoo.yolo
from zoo.files import replacing
from zoo.measuring.model_benchmark import cpu_name
from zoo.reading.digits import write_digit_scenes

TABLE = Path(__file__).with_suffix(".md")
ROWS = "<!-- rows: "
PLAIN = ("yolo11n.yaml", "yolo26n.yaml")
GOAL = 0.9
SCENES, EPOCHS, SIZE, LARGE = (1500, 200), 6, 96, 640
TRAINING = dict(epochs=EPOCHS, imgsz=SIZE, batch=16, optimizer="AdamW", lr0=0.002, lrf=0.05, warmup_epochs=1.0, mosaic=0.0, fliplr=0.0,
                scale=0.1, translate=0.05, workers=0, device="cpu", plots=False, amp=False, seed=0)


def all_files() -> list[str]:
    """Plain ones first, each mechanism in yolo11 and yolo26, and a whole backbone."""
    ready = [re.sub(r"^(yolo\d+)", r"\1n", name) for name in zoo.yolo.names()]
    return [*PLAIN, *ready, "yolo11n-biformer_tiny.yaml"]


def measure(name: str, data: Path, folder: Path) -> dict[str, float]:
    model, started, before = YOLO(name), time.monotonic(), _cpu_seconds()
    model.train(data=data / "digits.yaml", project=folder, name=Path(name).stem, exist_ok=True, verbose=False, **TRAINING)
    found = {"map50": float(model.metrics.box.map50), "map": float(model.metrics.box.map), "seconds": time.monotonic() - started,
             "cpu_seconds": _cpu_seconds() - before, "load": os.getloadavg()[1]}
    network = model.model.float().fuse(verbose=False).eval()
    _, parameters, _, gflops = model.info(verbose=True, imgsz=LARGE)
    for size in (SIZE, LARGE):
        image = torch.rand(1, 3, size, size)
        found[f"ms_{size}"] = _milliseconds(network, image)
    return {**found, "parameters": parameters, "gflops": gflops}


@torch.inference_mode()
def _milliseconds(network: torch.nn.Module, image: torch.Tensor) -> float:
    times = []
    for _ in range(12):
        started = time.perf_counter()
        network(image)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[2:])


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def load_rows() -> dict[str, dict[str, float]]:
    text = TABLE.read_text() if TABLE.is_file() else ""
    return json.loads(text.split(ROWS)[1].split(" -->")[0]) if ROWS in text else {}


def write_table(rows: dict[str, dict[str, float]]) -> None:
    rows = {name: rows[name] for name in all_files() if name in rows}
    missing = [name for name in all_files() if name not in rows]
    lines = [
        "# YOLO with zoo's mechanisms, on scenes of digits", "",
        f"From random weights, {SCENES[0]} scenes of {SIZE}×{SIZE} pixels for {EPOCHS} epochs, evaluated on {SCENES[1]} scenes of "
        f"other digits; {torch.get_num_threads()} thread of {cpu_name()}, CPython {platform.python_version()}, torch "
        f"{torch.__version__}, Ultralytics {ultralytics.__version__}. Time per image: the median of the fused network's, float32, batch "
        f"1. Wanted is an mAP50 of {GOAL}. `python -m benchmarks.yolo` measures it again, and goes on where it was stopped.", "",
        f"| model file | parameters | GFLOPs at {LARGE} | mAP50 | mAP50–95 | wall time | CPU time | ms at {SIZE} | ms at {LARGE} | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        below = "" if row["map50"] >= GOAL else " (below)"
        lines.append(f"| `{Path(name).stem}` | {row['parameters']:,.0f} | {row['gflops']:.1f} | {row['map50']:.3f}{below} | "
                     f"{row['map']:.3f} | {row['seconds']:.0f} s | {row['cpu_seconds']:.0f} s | {row[f'ms_{SIZE}']:.1f} | "
                     f"{row[f'ms_{LARGE}']:.0f} | {row['load']:.1f} |")
    lines += ["", f"Not run: {', '.join(f'`{Path(name).stem}`' for name in missing)}." if missing else "All were run.",
              "", "Load is how many processes wanted a core meanwhile, on average over five minutes: with more than there are cores, wall "
              "times say little, CPU times more.", "", f"{ROWS}{json.dumps(rows)} -->", ""]
    with replacing(TABLE) as written:
        written.write_text("\n".join(lines))


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in all_files()]:
        sys.exit(f"{', '.join(unknown)}: the model files are {', '.join(all_files())}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        write_digit_scenes(data, *SCENES, size=SIZE, layout="yolo")
        for name in dict.fromkeys([PLAIN[0], *(names or all_files())]):
            if names and name in names or name not in load_rows():
                row = measure(name, data, Path(folder) / "runs")
                write_table({**load_rows(), name: row})


if __name__ == "__main__":
    main(sys.argv[1:])
