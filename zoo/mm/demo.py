"""The main job on real input: train on handwritten digits, export, compare, predict."""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from zoo.checkpoints import load_trained
from zoo.exporting.onnx import Exported, export_onnx
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.config import load_config
from zoo.mm.datasets import DigitsDataset
from zoo.mm.training import train
from zoo.predicting.classification import Prediction, predict, write_annotated

CONFIG = "biformer_nano_digits"
PICTURED = 36


@dataclass(frozen=True)
class Demo:
    """What was measured, and the files: accuracies in percent, times in seconds, the export with its comparisons."""

    accuracy: float
    training_seconds: float
    parameters: int
    exported: Exported
    checkpoint: Path
    picture: Path
    predictions: list[tuple[str, Prediction]]


def run_demo(work_dir: Path) -> Demo:
    """Trains biformer_nano on digits in `work_dir`, or goes on where an earlier run stopped, and uses what came out.

    Leaves checkpoints, logs, an ONNX file, `PICTURED` held-out digits as PNG and a sheet of them with predictions.
    """
    start = time.perf_counter()
    _, metrics = train(CONFIG, work_dir=work_dir, resume="auto")
    seconds = time.perf_counter() - start
    checkpoint = cast(Path, latest_checkpoint(work_dir))  # which training leaves
    model, info = load_trained(checkpoint)
    exported = export_onnx(model, info, work_dir / f"{CONFIG}.onnx")

    held_out = DigitsDataset(**{key: value for key, value in load_config(CONFIG, ()).val_dataloader.dataset.items() if key != "type"})
    folder = work_dir / "held_out"
    folder.mkdir(exist_ok=True)
    truths, paths = [], []
    for i in range(PICTURED):
        image, target = held_out.read(i)
        truths.append(held_out.metainfo["classes"][target])
        paths.append(folder / f"{i:02d}_shows_{truths[-1]}.png")
        image.save(paths[-1])
    predictions = predict(model, info, paths, top=3)
    picture, = write_annotated(predictions, work_dir / "predictions.png")
    parameters = sum(p.numel() for p in model.parameters())
    return Demo(metrics["accuracy/top1"], seconds, parameters, exported, checkpoint, picture, list(zip(truths, predictions, strict=True)))
