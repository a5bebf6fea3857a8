"""Ways to run training, in this process and in others."""
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_runs import TINY

ROOT = Path(__file__).parents[2]


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
                              capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run
