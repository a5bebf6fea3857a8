import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Read when Ultralytics is imported, which is in a folder of its own and never asks a network.
os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": tempfile.mkdtemp(), "YOLO_VERBOSE": "false"}
collect_ignore_glob = [] if importlib.util.find_spec("ultralytics") else ["test_*.py"]
ROOT = Path(__file__).parents[2]
QUICK = dict(imgsz=64, batch=4, workers=0, plots=False, device="cpu", fliplr=0.0, mosaic=0.0, exist_ok=True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Scenes in YOLO's format."""
    from zoo.reading.digits import write_digit_scenes

    root = tmp_path_factory.mktemp("digits")
    write_digit_scenes(root, 8, 4, size=64, layout="yolo")
    return root


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """Trains a model file for an epoch, or what is said; returns the YOLO object."""
    from ultralytics import YOLO

    import zoo.yolo  # noqa: F401

    def run(file, data, model=None, **more):
        model = model or YOLO(file)
        model.train(data=str(data), project=str(tmp_path_factory.mktemp("runs")), **{**QUICK, "epochs": 1, **more})
        return model

    return run


@pytest.fixture(scope="session")
def trained(train, digits):
    """A detector with DAS after its sums."""
    return train("yolo11n-das.yaml", digits / "digits.yaml")


@pytest.fixture
def fresh_process():
    """Runs Python in a process of its own, which finds zoo and imports nothing of it; returns what it prints."""

    def run(*arguments, **environment):
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
                              capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        return done.stdout

    return run
