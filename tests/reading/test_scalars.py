"""Curves are those of an unbroken run, whatever happened to it."""
import json
import math
from datetime import datetime
from pathlib import Path

from zoo.reading.scalars import read_scalars


def _run(work_dir: Path, stamp: str, lines: list[dict], resume: bool = True, end: str = "\n") -> None:
    folder = work_dir / stamp / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("\n".join(map(json.dumps, lines)) + end)
    (folder / "config.py").write_text(f"model = dict()\nresume = {resume}\n")


def _train(step: int, epoch: int, loss: float) -> dict:
    return {"lr": 0.1, "loss": loss, "data_time": 1.0, "time": 1.0, "memory": 5, "epoch": epoch, "iter": step, "step": step}


def test_a_resumed_run_has_every_point_once(tmp_path):
    _run(tmp_path, "20260101_100000", [
        _train(2, 1, 9.0), _train(4, 1, 8.0), {"accuracy/top1": 10.0, "time": 1.0, "step": 1},
        _train(6, 2, 7.0), _train(8, 2, 6.0), {"accuracy/top1": 20.0, "time": 1.0, "step": 2}, _train(10, 3, 5.0)],
        resume=False, end='\n{"loss": 4.')  # killed as it wrote
    _run(tmp_path, "20260101_110000", [_train(6, 2, 70.0), _train(8, 2, math.nan)])  # from the end of epoch 1
    (tmp_path / "pictures" / "vis_data").mkdir(parents=True)
    (tmp_path / "pictures" / "vis_data" / "scalars.json").write_text("{}")  # no run's
    scalars = read_scalars(tmp_path)
    assert [step for step, _ in scalars.train["loss"]] == [2, 4, 6, 8]
    assert [loss for _, loss in scalars.train["loss"][:3]] == [9, 8, 70] and math.isnan(scalars.train["loss"][3][1])
    assert scalars.held_out == {"accuracy/top1": [(1, 10.0)]}  # what was measured at epoch 2 is of weights that are gone
    assert set(scalars.train) == {"lr", "loss"} and scalars.epochs[8] == 2
    assert scalars.begun == [datetime(2026, 1, 1, 10), datetime(2026, 1, 1, 11)]


def test_a_new_training_in_the_same_folder_stands_alone(tmp_path):
    _run(tmp_path, "20260101_100000", [_train(2, 1, 9.0), {"iou/mean": 10.0, "step": 1}], resume=False)
    _run(tmp_path, "20260102_100000", [_train(4, 1, 3.0)], resume=False)
    scalars = read_scalars(tmp_path)
    assert scalars.train["loss"] == [(4, 3.0)] and not scalars.held_out and len(scalars.begun) == 1


def test_by_iterations(tmp_path):
    line = {"loss": 1.0, "iter": 20, "step": 20}
    _run(tmp_path, "20260101_100000", [line, {"mIoU": 3.0, "step": 20}, {**line, "iter": 40, "step": 40}, {"mIoU": 4.0, "step": 40}])
    _run(tmp_path, "20260101_110000", [{**line, "iter": 40, "step": 40}, {"mIoU": 5.0, "step": 40}])
    scalars = read_scalars(tmp_path)
    assert scalars.held_out["mIoU"] == [(20, 3.0), (40, 5.0)] and not scalars.epochs


def test_no_run_has_no_curves(tmp_path):
    assert read_scalars(tmp_path).train == {}
