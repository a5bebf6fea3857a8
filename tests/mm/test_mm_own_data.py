"""`zoo train MODEL DATA`: every kind of data, from files to a checkpoint that the other commands take."""
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.checkpoints import load_trained
from zoo.mm import evaluate, train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.predicting.classification import predict
from zoo.tools._cli import command


@pytest.fixture
def zoo_train(capfd, tmp_path) -> Callable[..., tuple[str, Path]]:
    """Runs `zoo train MODEL DATA …`; what it says, and the work dir."""
    def run(*arguments: object, work_dir: str = "run") -> tuple[str, Path]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            command(["train", *map(str, arguments), "--work-dir", str(tmp_path / work_dir)])
        said = capfd.readouterr()
        assert end.value.code in (None, 0), said.err[-3000:]
        return said.out, tmp_path / work_dir

    return run


@pytest.fixture
def zoo_refuses(capfd, tmp_path, monkeypatch) -> Callable[..., str]:
    """Runs `zoo train MODEL DATA …`, which has to end in one line and leave nothing."""
    def run(*arguments: object) -> str:
        before = set(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            command(["train", *map(str, arguments)])
        said = capfd.readouterr()
        assert end.value.code == 2 and len(said.err.splitlines()) == 1 and said.err.startswith("error: "), said
        assert set(tmp_path.rglob("*")) == before
        return said.err

    return run


def write_picture(path: Path, value: int | tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> None:
    """A noisy picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(path.as_posix().encode())).integers(-20, 20, (*size[::-1], 3))
    Image.fromarray((np.asarray(value) + noise).clip(0, 255).astype(np.uint8)).save(path)


def write_colours(root: Path, count: int = 12) -> Path:
    for place, name in enumerate(("blue", "green", "red")):
        for i in range(count):
            write_picture(root / name / f"{i}.png", tuple(np.roll((200, 30, 30), -place - 1)))
    return root


def test_class_folders_train_and_go_on(zoo_train, tmp_path):
    data = write_colours(tmp_path / "colours")
    said, work_dir = zoo_train("test_resnet", data, "--epochs", 3, "--batch", 4, "--lr", 0.01)
    assert re.search(r"colours: class folders, 2\d for train, \d+ for val", said) and re.search(r"\bgreen +\d+ +\d+", said)
    assert "12 of 36" not in said and "fold 0 of 5" in said and "32x32" in said
    assert Image.open(work_dir / "samples.png").size > (300, 300)
    best, = work_dir.glob("best_*.pth")
    accuracy = evaluate(work_dir / "config.py", best)["accuracy/top1"]
    assert accuracy > 60
    model, info = load_trained(best)
    assert info.classes == ("blue", "green", "red") and info.input_size == (3, 32, 32)
    assert predict(model, info, [data / "red" / "0.png"])[0].classes[0][0] in info.classes

    train(work_dir / "config.py", work_dir=work_dir, resume="auto", cfg_options=["train_cfg.max_epochs=4"])
    assert latest_checkpoint(work_dir).name == "epoch_4.pth"
