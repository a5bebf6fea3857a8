import contextlib
import functools
import io
import os
import random
import re
import resource

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

# Read when triton is imported. With a GPU the same tests run the kernels on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
else:
    torch.backends.cudnn.allow_tf32 = False  # what kernels are compared with computes in float32
    # The same examples in every run; shrinking one that fails would compile kernels for minutes.
    settings.register_profile("gpu", derandomize=True, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("gpu")
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
torch.manual_seed(0)  # for what is built while tests are collected


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
