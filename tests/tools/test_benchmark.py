import json
import math

import pytest
import torch
from torch import nn

from benchmarks import resnet50
from zoo.errors import InputError
from zoo.measuring import model_benchmark as measuring
from zoo.measuring.model_benchmark import Comparison, Side, benchmark

SIZE = ["--size", "32", "32", "--batch", "2", "--threads", "1", "--rounds", "3"]


class Clock:
    """Time that passes only while a model runs."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now


class Rival(nn.Module):
    """Takes a given time, and memory for a given number of copies of its input."""

    def __init__(self, clock: Clock, seconds: float, name: str, copies: int = 0):
        super().__init__()
        self.clock, self.seconds, self.name, self.copies = clock, seconds, name, copies
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.clock.now += self.seconds
        self.clock.order.append((self.name, self.training, torch.is_grad_enabled()))
        held = [x.clone() for _ in range(self.copies)]
        out = (x * self.weight).mean((2, 3))
        del held
        return out


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("benchmark").main


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Makes `load_model` give a model that takes one second of this clock."""
    clock = Clock()
    info = measuring.load_model("test_resnet")[1]
    monkeypatch.setattr(measuring, "load_model", lambda name: (Rival(clock, 1.0, "ours"), info))
    return clock


def test_ratio_is_rival_over_ours(clock):
    report = benchmark(["any"], lambda name: Rival(clock, 3.0, "rival"), size=(8, 8), rounds=4, threads=1, clock=clock)
    assert [row.kind for row in report.comparisons] == ["forward", "forward + backward"]
    for row in report.comparisons:
        assert row.ours.seconds == (1.0,) * 4
        assert row.rival.seconds == (3.0,) * 4
        assert row.ratios == (3.0, 3.0, 3.0)
    assert "| 1000.0 | 3000.0 | 3.00 (3.00 to 3.00) |" in report.markdown()


def test_takes_turns_in_the_right_modes(clock):
    benchmark(["any"], lambda name: Rival(clock, 3.0, "rival"), size=(8, 8), rounds=3, threads=1, clock=clock)
    forward, backward = (clock.order[i:i + len(clock.order) // 2] for i in (0, len(clock.order) // 2))
    for calls, mode in [(forward, (False, False)), (backward, (True, True))]:
        assert [name for name, *_ in calls[-6:]] == ["ours", "rival"] * 3
        assert {tuple(modes) for _, *modes in calls} == {mode}
        assert {name for name, *_ in calls[:-6]} == {"ours", "rival"}  # warmed up


def test_quartiles_are_of_the_rounds_ratios():
    row = Comparison("any", "forward", Side((1.0, 2.0, 1.0, 2.0, 1.0), 0), Side((1.0, 4.0, 3.0, 8.0, 5.0), 0))
    assert row.ratios == (2.0, 3.0, 4.0)
    assert row.rival.median == 4.0


def test_peak_memory_is_of_tensors_held_at_once(clock):
    report = benchmark(["any"], lambda name: Rival(clock, 1.0, "rival", copies=5), batch=4, size=(64, 64), rounds=1, threads=1, clock=clock)
    copy = 4 * 3 * 64 * 64 * 4
    forward, backward = report.comparisons
    assert forward.ours.peak_memory == pytest.approx(copy, rel=0.01)
    assert forward.rival.peak_memory == pytest.approx(6 * copy, rel=0.01)
    assert backward.ours.peak_memory >= copy
    again = benchmark(["any"], batch=4, size=(64, 64), rounds=1, threads=1, clock=clock)
    assert [row.ours.peak_memory for row in again.comparisons] == [row.ours.peak_memory for row in report.comparisons]


def test_threads_are_set_for_the_measurement_only(clock):
    before, seen = torch.get_num_threads(), []

    def rival(name: str) -> nn.Module:
        seen.append(torch.get_num_threads())
        return Rival(clock, 1.0, "rival")

    benchmark(["any"], rival, size=(8, 8), rounds=1, threads=before + 1, clock=clock)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_prints_a_table_and_writes_every_round(main, tmp_path, capsys):
    path = tmp_path / "x.json"
    assert main(["test_resnet", *SIZE, "--against", "timm:create_model", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    for fact in ("- date: 20", f"torch {torch.__version__}", "batch 2, 32x32, float32, cpu", "1 threads", "- rounds: 3"):
        assert fact in out
    table = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("|")]
    assert len({len(row) for row in table}) == 1
    assert [row[1].strip() for row in table[2:]] == ["forward", "forward + backward"]
    found = json.loads(path.read_text())["comparisons"]
    for cells, row in zip(table[2:], found, strict=True):
        ours, theirs = row["ours"], row["rival"]
        assert len(ours["seconds"]) == len(theirs["seconds"]) == 3
        assert float(cells[2]) == pytest.approx(1e3 * sorted(ours["seconds"])[1], abs=0.051)
        ratios = sorted(b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True))
        assert float(cells[4].split()[0]) == pytest.approx(ratios[1], abs=0.0051)
        assert ours["peak_memory"] == theirs["peak_memory"] > 0
        assert math.isclose(float(cells[5]), ours["peak_memory"] / 2**20, abs_tol=0.051)


def test_a_checkpoint_without_a_rival_in_another_dtype(main, checkpoint, capsys):
    assert main([str(checkpoint), *SIZE, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16" in out
    assert out.count("| test_resnet |") == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["resnet_18"], "'resnet_18'; did you mean .*resnet18"),
    (["test_vit", *SIZE[3:], "--size", "30", "30"], r"test_vit does not run forward on \(2, 3, 30, 30\)"),
    (["test_resnet", "--batch", "0"], "batch is 0; it has to be at least 1"),
    (["test_resnet", "--size", "0", "32"], "size is 0"),
    (["test_resnet", "--against", "timm"], "'timm' does not name a callable; write MODULE:CALLABLE"),
    (["test_resnet", "--against", "timm_:x"], "the module timm_ cannot be imported"),
    (["test_resnet", "--against", "timm:create_modle"], "timm has no callable create_modle; did you mean create_model"),
    (["test_resnet", "--against", "builtins:str"], "the rival for test_resnet has to be a torch.nn.Module, not str"),
    (["test_resnet", "--json", "nowhere/x.json"], "there is no folder nowhere"),
])
def test_arguments_that_cannot_be_used(main, arguments, message):
    with pytest.raises(InputError, match=message):
        main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu(main):
    with pytest.raises(InputError, match="torch finds no GPU here"):
        main(["test_resnet", "--device", "cuda"])


def test_malicious_checkpoint_is_one_line_and_exit_status_2(run_tool, malicious, tmp_path):
    path, created = malicious
    done = run_tool("benchmark", path, "--json", tmp_path / "x.json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path} would run code on loading")
    assert not created.exists()
    assert list(tmp_path.iterdir()) == [path]


def test_forward_passes_alone_of_volumes_beside_a_resnet_of_their_slices(main, capsys):
    arguments = ["attention_unet3d_nano", "--size", "8", "32", "32", "--batch", "2", "--threads", "1", "--rounds", "1"]
    assert main([*arguments, "--forward-only", "--against", "benchmarks.resnet50:build"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| attention_unet3d_nano |")]
    assert len(rows) == 1 and "| forward |" in rows[0]
    assert resnet50.build("any")(torch.randn(2, 1, 3, 32, 32)).shape == (6, 1000)


def test_volumes():
    report = benchmark(["attention_unet3d_nano"], size=(8, 8, 12), rounds=1, threads=1)
    assert "batch 4, 8x8x12" in report.facts["input"] and len(report.comparisons) == 2


def test_the_header_names_the_kind_of_cpu_and_what_is_compiled(clock, monkeypatch):
    compiled = []

    def note(model):
        compiled.append(model)

    monkeypatch.setattr(nn.Module, "compile", note)
    for wanted, mode in ((False, "eager"), (True, "torch.compile")):
        facts = benchmark(["any"], lambda name: Rival(clock, 3.0, "rival"), size=(8, 8), rounds=1, threads=1, compiled=wanted).facts
        assert facts["mode"] == mode and torch.backends.cpu.get_cpu_capability() in facts["machine"]
    assert [model.name for model in compiled] == ["ours", "rival"]
