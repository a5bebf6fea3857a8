"""The guide's plain onnxruntime code answers as `zoo predict` does, and its table lists what files hold."""
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from zoo.checkpoints import load_trained
from zoo.exporting.onnx import export_onnx
from zoo.tools import predict

CLASSIFIER = {"task": "classification", "model": "test_resnet", "model_args": {}, "classes": ["circle", "square", "star"],
              "input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.3, 0.2), "interpolation": "bicubic", "crop_pct": 0.9}
UNET = {"task": "segmentation", "model": "attention_unet", "model_args": {"widths": (4, 6, 8), "in_chans": 1, "num_classes": 3},
        "classes": ["ground", "a", "b"], "input_size": (1, 64, 48), "mean": (0.4,), "std": (0.2,)}
UNET3D = {"task": "segmentation", "model": "attention_unet3d", "model_args": {"widths": (4, 6), "num_classes": 2},
          "classes": ["ground", "a"], "input_size": (1, 8, 8, 8), "spacing": (1.0, 1.0, 2.0), "clip": (0.0, 100.0)}


def _exported(record: dict, folder: Path, name: str, **options) -> tuple[Path, Path]:
    """A checkpoint, and its ONNX file."""
    torch.manual_seed(0)
    arguments = {"num_classes": len(record["classes"]), **record["model_args"]}
    model = timm.create_model(record["model"], **arguments)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):  # outputs that differ from picture to picture
            torch.nn.init.kaiming_normal_(part.weight)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"zoo": record, "state_dict": state}, folder / "x.pth")
    export_onnx(*load_trained(folder / "x.pth"), folder / name, **options)
    return folder / "x.pth", folder / name


def _noise(folder: Path, size: tuple[int, int]) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((size[1] * 3, size[0] * 3), Image.Resampling.BICUBIC).save(folder / "picture.png")
    return folder / "picture.png"


@pytest.mark.parametrize("shape", [(21, 37), (50, 30)])
def test_a_classifier(run_block, tmp_path, shape):
    checkpoint, exported = _exported(CLASSIFIER, tmp_path, "classifier.onnx")
    picture = _noise(tmp_path, shape)
    found = run_block("exporting.md", "onnx-classifier", tmp_path)["probabilities"]
    assert found.std() > 1e-3
    for source in (checkpoint, exported):
        assert predict.main([str(source), str(picture), "-o", str(tmp_path / "x.json")]) == 0
        rows = json.loads((tmp_path / "x.json").read_text())
        assert {row["class"]: row["probability"] for row in rows} == pytest.approx(
            dict(zip(CLASSIFIER["classes"], found.tolist(), strict=True)), abs=2e-5)


def test_files_of_one_size_and_batch_answer_for_any_number_of_pictures(tmp_path):
    checkpoint, exported = _exported(CLASSIFIER, tmp_path, "classifier.onnx", free_size=False, batch=2)
    picture = _noise(tmp_path, (21, 37))
    for i in range(2):
        Image.open(picture).rotate(90 * (i + 1), expand=True).save(tmp_path / f"{i}.png")
    answers = []
    for source in (checkpoint, exported):
        assert predict.main([str(source), str(tmp_path), "-o", str(tmp_path / "x.json")]) == 0
        rows = json.loads((tmp_path / "x.json").read_text())
        answers.append({(row["picture"], row["class"]): row["probability"] for row in rows})
    assert len(answers[0]) == 9 and answers[0] == pytest.approx(answers[1], abs=2e-5)


def test_a_unet(run_block, tmp_path):
    checkpoint, exported = _exported(UNET, tmp_path, "unet.onnx")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)).save(tmp_path / "picture.png")
    labels = run_block("exporting.md", "onnx-unet", tmp_path)["labels"]
    assert len(np.unique(labels)) > 1 and np.array_equal(Image.open(tmp_path / "labels.png"), labels)
    for source in (checkpoint, exported):
        assert predict.main([str(source), str(tmp_path / "picture.png"), "-o", str(tmp_path / "x.png")]) == 0
        assert (np.asarray(Image.open(tmp_path / "x.png")) != labels).mean() < 1e-3  # where rounding decides


@pytest.mark.parametrize(("record", "kind"), [(CLASSIFIER, "classifiers"), (UNET, "U-Nets"), (UNET3D, "volumes")])
def test_the_table_lists_what_files_hold(documented_keys, tmp_path, record, kind):
    _, path = _exported(record, tmp_path, "x.onnx", free_size=False)
    said = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert set(said) == documented_keys(kind)
    assert json.loads(said["task"]) == record["task"]
