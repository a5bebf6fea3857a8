import argparse
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu as gpu_tool
from benchmarks import kernel_cases
from zoo.errors import InputError

UNHURRIED = ["--seconds", "1000000"]  # no test depends on the machine's speed


@pytest.mark.parametrize(("arguments", "message"), [
    (["tunes"], "there is no step 'tunes'; steps are check, measure, tune, train"),
    ([], "torch finds no GPU here; --dry-run goes through the steps on the CPU"),
])
def test_wrong_use_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        gpu_tool.main(arguments)


@pytest.fixture
def dry(monkeypatch):
    """The tool, with one operator to measure, and what its pages say."""
    gpu, pages = gpu_tool, {}
    monkeypatch.setattr(gpu, "write", lambda name, title, text, args: pages.__setitem__(name, text))
    monkeypatch.setattr(kernel_cases, "CASES", {"region_routes": kernel_cases.CASES["region_routes"]})
    return gpu, pages


def test_dry_run_measures(dry, capsys, monkeypatch):
    gpu, pages = dry
    monkeypatch.setattr(torch, "compile", lambda network, fullgraph, backend: network)  # tests/models/test_compiled_training.py compiles
    assert gpu.main(["measure", "--dry-run", *UNHURRIED]) == 0
    assert "| region_routes, BiFormer stage 1, 16×16, batch 1 | forward + backward | pooled, compiled |" in pages["kernels"]
    assert gpu.main(["train", "--dry-run", *UNHURRIED]) == 0
    for side in ("ours, eager", "attnet_authors, eager", "ours, compiled", "reference, compiled", "ours, max-autotune"):
        assert re.search(rf"\| attnet_xxs \| 2 \| {side} \| \d+ \| \d+\.\d\d \|", pages["training"])
    assert pages["kernels"] in capsys.readouterr().out


def test_without_time_nothing_is_written(dry, capsys):
    gpu, pages = dry
    for step in ("measure", "train"):
        assert gpu.main([step, "--dry-run", "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    for left_out in ("region_routes, BiFormer stage 1", "attnet_xxs, ours, eager"):
        assert f"not measured, out of time: {left_out}" in said
    assert not pages


def test_what_fails_is_said_beside_what_was_measured(dry, monkeypatch):
    gpu, pages = dry

    def cases(*where):
        for case in kernel_cases.region_routes(*where):
            yield case._replace(rivals=case.rivals | {"broken": kernel_cases.side(torch.linalg.inv, torch.zeros(2, 3))})

    monkeypatch.setattr(kernel_cases, "CASES", {"region_routes": cases})
    assert gpu.main(["measure", "--dry-run", *UNHURRIED]) == 0
    assert "| broken | failed: RuntimeError: " in pages["kernels"] and "| forward | pooled, compiled | " in pages["kernels"]

    monkeypatch.setattr(gpu.benchmark, "training_throughput", lambda build, backend, mode, *_: 1 / 0 if mode is None else 2.0)
    monkeypatch.setattr(gpu, "RIVALS", {"attnet_t2": "attnet_authors"})
    assert not gpu.train("cpu", gpu.benchmark.Deadline(math.inf), argparse.Namespace(dry_run=False))
    assert "| attnet_t2 | 64 | ours, eager | failed: ZeroDivisionError: division by zero | |" in pages["training"]
    assert pages["training"].endswith("| attnet_t2 | 64 | ours, max-autotune | 2 |  |")


def test_one_problem_of_every_operator_comes_first():
    order = gpu_tool.in_turn([iter("abc"), iter("x"), iter("pq")])
    assert "".join(order) == "axpbqc"


def test_steps_are_processes_and_the_rest_goes_on(monkeypatch, capsys):
    gpu, done = gpu_tool, []

    now = 5.0
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now))

    def run(command, timeout, **_):
        nonlocal now
        now += 10
        step, left = command[3], int(command[5])
        done.append((step, left, command[6:]))
        assert left < timeout
        if step == "measure":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, int(step == "check"))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main(["--dry-run", "--seconds", "104", "--output", "there"]) == 1
    rest = ["--dry-run", "--output", gpu.Path("there")]
    assert done == [("check", 22, rest), ("measure", 46, rest), ("tune", 60, rest), ("train", 74, rest)]  # of 22, 56, 80 and 104
    said = capsys.readouterr().out
    assert "measure did not end and was stopped" in said and "failed: check, measure" in said


def test_a_step_is_a_process(monkeypatch):
    gpu = gpu_tool
    monkeypatch.setattr(gpu, "GRACE", math.inf)
    assert gpu.run_alone("train", 0, argparse.Namespace(dry_run=True, output=None))


def test_tests_that_take_too_long_are_stopped_and_say_what_failed(monkeypatch, capfd, tmp_path):
    gpu, popen, started = gpu_tool, subprocess.Popen, tmp_path / "started"
    os.mkfifo(started)
    endless = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
try:
    open({str(started)!r}, 'w').close()
    while True: pass
except KeyboardInterrupt:
    print('failed: this')
"""
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **_: popen([sys.executable, "-c", endless]))
    monkeypatch.setattr(gpu, "LAST_WORDS", math.inf)

    class WhenStarted:
        """A deadline that has come when the tests have begun, however long that takes."""

        @property
        def left(self) -> int:
            return len(started.read_text())

    assert not gpu.check("cpu", WhenStarted(), argparse.Namespace(dry_run=True, seconds=3))
    said = capfd.readouterr().out
    assert "the tests were not done after 3 seconds and were stopped" in said and "failed: this" in said


def test_results_are_copied(tmp_path, monkeypatch):
    gpu = gpu_tool
    monkeypatch.setenv("OUT", str(tmp_path / "from environment"))
    gpu.copy(gpu.CONFIGURATIONS, argparse.Namespace(output=tmp_path / "out"))
    for folder in ("out", "from environment"):
        assert (tmp_path / folder / "configurations.json").read_bytes() == gpu.CONFIGURATIONS.read_bytes()
    monkeypatch.delenv("OUT")
    gpu.copy(gpu.CONFIGURATIONS, argparse.Namespace(output=None))
