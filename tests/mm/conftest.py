"""Short runs on the handwritten digits, as arguments of the tools."""
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# four steps of 16 images an epoch, of a transformer without batch norm
TINY = [
    "model.name=test_vit", "model.args={'num_classes': 10, 'in_chans': 1, 'img_size': 32, 'drop_path_rate': 0.1}",
    "train_dataloader.dataset.limit=64", "train_dataloader.batch_size=16", "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False", "val_dataloader.dataset.limit=40", "test_dataloader.dataset.limit=40",
    "train_cfg.max_epochs=2", "train_cfg.val_interval=2", "auto_scale_lr.enable=False",
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_train(tmp_path: Path) -> Callable[..., tuple[dict, dict, Path]]:
    """Trains in this process; returns the last checkpoint, the metrics and the work dir."""
    from zoo.mm import train
    from zoo.mm.checkpoint import latest_checkpoint, load_from_local

    def run(name: str, *options: str, **arguments) -> tuple[dict, dict, Path]:
        folder = tmp_path / name
        options = [*TINY, f"experiment_name={tmp_path.name}-{name}", *options]  # the engine keeps state by that name
        _, metrics = train("biformer_nano_digits", work_dir=folder, cfg_options=options, **arguments)
        return load_from_local(latest_checkpoint(folder)), metrics, folder

    return run


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python in a process of its own, on one thread, from the root of the repository."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run
