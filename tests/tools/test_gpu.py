import argparse
import subprocess
import sys

import pytest
import torch

from benchmarks import kernel_cases
from zoo.errors import InputError


@pytest.mark.parametrize(("arguments", "message"), [
    (["tunes"], "there is no step 'tunes'; steps are check, tune, measure, train"),
    ([], "torch finds no GPU here; --dry-run goes through the steps on the CPU"),
])
def test_wrong_use_is_one_line(load_tool, arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        load_tool("gpu").main(arguments)


@pytest.fixture
def dry(load_tool, monkeypatch):
    """The tool, with one operator to measure, and what its pages say."""
    gpu, pages = load_tool("gpu"), {}
    monkeypatch.setattr(gpu, "write", lambda name, title, text, args: pages.__setitem__(name, text))
    monkeypatch.setattr(kernel_cases, "CASES", {"region_routes": kernel_cases.CASES["region_routes"]})
    return gpu, pages


def test_dry_run_measures(dry, capsys):
    gpu, pages = dry
    assert gpu.main(["measure", "--dry-run"]) == 0
    assert "| region_routes, BiFormer stage 1, 16×16, batch 1 | forward + backward | reference |" in pages["kernels"]
    assert gpu.main(["train", "--dry-run"]) == 0
    assert "| biformer_nano | 2 |" in pages["training"]
    assert pages["kernels"] in capsys.readouterr().out


def test_without_time_nothing_is_written(dry, capsys):
    gpu, pages = dry
    for step in ("measure", "train"):
        assert gpu.main([step, "--dry-run", "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert "not measured, out of time: region_routes, BiFormer stage 1" in said and "not measured, out of time: biformer_nano" in said
    assert not pages


def test_what_fails_is_said_beside_what_was_measured(dry, monkeypatch):
    gpu, pages = dry

    def cases(*where):
        for case in kernel_cases.region_routes(*where):
            yield case._replace(rivals=case.rivals | {"broken": kernel_cases.side(torch.linalg.inv, torch.zeros(2, 3))})

    monkeypatch.setattr(kernel_cases, "CASES", {"region_routes": cases})
    assert gpu.main(["measure", "--dry-run"]) == 0
    assert "| broken | failed: RuntimeError: " in pages["kernels"] and "| forward | pytorch | " in pages["kernels"]

    monkeypatch.setattr(gpu.benchmark, "training_throughput", lambda model, backend, *_: 1 / 0 if backend is None else 2.0)
    monkeypatch.setattr(gpu, "MODELS", ("biformer_nano",))
    gpu.train("cpu", gpu.benchmark.Deadline(100), argparse.Namespace(dry_run=False))
    assert pages["training"].endswith("| biformer_nano | 64 | failed: ZeroDivisionError: division by zero | 2 |  |")


def test_steps_are_processes_and_the_rest_goes_on(load_tool, monkeypatch, capsys):
    gpu, done = load_tool("gpu"), []

    def run(command, timeout, **_):
        step, left = command[2], int(command[4])
        done.append((step, left, command[5:]))
        assert left < timeout
        if step == "tune":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, int(step == "check"))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main(["--dry-run", "--seconds", "104", "--output", "there"]) == 1
    rest = ["--dry-run", "--output", gpu.Path("there")]
    assert done == [("check", 30, rest), ("tune", 56, rest), ("measure", 86, rest), ("train", 104, rest)]
    said = capsys.readouterr().out
    assert "tune did not end and was stopped" in said and "failed: check, tune" in said


def test_a_step_is_a_process(load_tool):
    assert load_tool("gpu").run_alone("train", 0, argparse.Namespace(dry_run=True, output=None))


def test_tests_that_take_too_long_are_stopped_and_say_what_failed(load_tool, monkeypatch, capfd):
    gpu, popen = load_tool("gpu"), subprocess.Popen
    slow = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('failed: this')"
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **_: popen([sys.executable, "-c", slow]))
    assert not gpu.check("cpu", gpu.benchmark.Deadline(3), argparse.Namespace(dry_run=True, seconds=3))
    said = capfd.readouterr().out
    assert "the tests were not done after 3 seconds and were stopped" in said and "failed: this" in said


def test_results_are_copied(load_tool, tmp_path):
    gpu = load_tool("gpu")
    gpu.copy(gpu.CONFIGURATIONS, argparse.Namespace(output=tmp_path / "out"))
    assert (tmp_path / "out" / "configurations.json").read_bytes() == gpu.CONFIGURATIONS.read_bytes()
