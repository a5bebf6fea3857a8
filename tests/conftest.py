import contextlib
import functools
import io
import os
import random
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Read when triton is imported. With a GPU the same tests run the kernels on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
else:
    torch.backends.cudnn.allow_tf32 = False  # what kernels are compared with computes in float32
# No test depends on speed. On a GPU the same examples are drawn in every run; shrinking one that fails would compile kernels for minutes.
ON_GPU = dict(derandomize=True, phases=(Phase.explicit, Phase.generate)) if torch.cuda.is_available() else {}
settings.register_profile("zoo", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow], **ON_GPU)
settings.load_profile("zoo")
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
torch.manual_seed(0)  # for what is built while tests are collected


def pytest_addoption(parser):
    parser.addoption("--check", action="store_true", help="of every file only the first test that is not marked `long`: every room once")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--check"):
        first = {item.path: item for item in reversed(items) if not item.get_closest_marker("long")}
        config.hook.pytest_deselected(items=[item for item in items if first.get(item.path) is not item])
        items[:] = [item for item in items if first.get(item.path) is item]


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws without a seed of its own is the same in every run, order and worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def load_tool_help():
    """What `zoo NAME --help` prints."""
    from zoo.tools._cli import command  # after triton has been told where to run

    @functools.cache
    def read(name: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as end:
            command([name, "--help"])
        assert end.value.code == 0, f"there is no program {name}"
        return said.getvalue()

    return read


@pytest.fixture
def run_block(monkeypatch):
    """Executes the Python of a guide that is marked with a name, in a folder; returns its variables."""

    def run(page: str, name: str, folder: Path) -> dict:
        text = (Path(__file__).parents[1] / "docs" / "guides" / page).read_text()
        code, = re.findall(rf"```python {name}\n(.*?)```", text, re.S)
        monkeypatch.chdir(folder)
        variables: dict = {}
        exec(compile(code, name, "exec"), variables)
        return variables

    return run


@pytest.fixture
def documented_keys():
    """The keys of metadata that the guide's table lists for ONNX files of these kinds."""

    def read(*kinds: str) -> set[str]:
        text = (Path(__file__).parents[1] / "docs/guides/exporting.md").read_text()
        of = {"all", *kinds} | ({"all but volumes"} if "volumes" not in kinds else set())
        rows = re.findall(r"^\| (`.*?) \| (.*?) \| ", text, re.M)
        return {key for keys, whose in rows if whose in of for key in re.findall(r"`(\w+)`", keys)}

    return read


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond 4 KiB: the system answers as it does on a full disk."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def pytest_terminal_summary(terminalreporter):
    """Every reference vector by name, and what tests record as "said", whatever the verbosity."""
    reports = [report for outcome in ("passed", "failed", "error", "skipped") for report in terminalreporter.stats.get(outcome, [])]
    vectors = {re.search(r"test_reference_vector\[(.+)\]", report.nodeid): report.outcome for report in reports}
    lines = sorted(f"{match.group(1)}: {outcome}" for match, outcome in vectors.items() if match)
    if lines:
        terminalreporter.section("reference vectors")
        terminalreporter.write_line("\n".join(lines))
    for report in terminalreporter.stats.get("passed", []):
        for line in (value for name, value in report.user_properties if name == "said"):
            terminalreporter.write_line(line)
