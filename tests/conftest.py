import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def load_tool_help():
    """What a tool prints for --help."""

    @functools.cache
    def read(path: Path) -> str:
        return subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True).stdout

    return read
