"""Programs as modules and as processes, and checkpoints for them to read: good, foreign, damaged and malicious."""
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parents[2]
MODEL = "test_resnet"
CLASSES = ("circle", "square", "star")


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """A program as a module, so that its `main` can be called without starting a process."""
    return lambda name: importlib.import_module(f"zoo.tools.{name}")


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., subprocess.CompletedProcess]:
    """`python -m zoo NAME …` in a process of its own."""
    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "zoo", name, *map(str, arguments)], capture_output=True, text=True,
                              cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    return run


@pytest.fixture(scope="session")
def trained() -> dict:
    """What training writes, for a small model with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=len(CLASSES))
    with torch.no_grad():  # far enough apart that probabilities differ
        model.get_classifier().weight.mul_(20)
    return {
        "zoo": {"task": "classification", "model": MODEL, "model_args": {}, "classes": list(CLASSES), "input_size": (3, 64, 64),
                "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear", "crop_pct": 1.0},
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "optimizer": {"state": {}, "param_groups": []},
    }


@pytest.fixture(scope="session")
def checkpoint(trained: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "trained.pth"
    torch.save(trained, path)
    return path


class _CreatesFile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def malicious(trained: dict, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the file that it creates if it is unpickled without restrictions."""
    path, created = tmp_path / "malicious.pth", tmp_path / "created by the checkpoint"
    torch.save(trained | {"extra": _CreatesFile(created)}, path)
    return path, created
