import pytest

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


def test_dry_run_measures_and_writes_nothing(load_tool, monkeypatch, capsys):
    gpu = load_tool("gpu")
    monkeypatch.setattr(gpu, "write", lambda name, title, text, device, dry: print(name, text, dry))
    monkeypatch.setattr(kernel_cases, "CASES", {"region_routes": kernel_cases.CASES["region_routes"]})
    assert gpu.main(["measure", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "| region_routes, BiFormer stage 1, 16×16, batch 1 | forward + backward | reference |" in printed and "True" in printed
    assert gpu.main(["measure", "--dry-run", "--seconds", "0"]) == 0
    assert "Not measured, out of time: region_routes" in capsys.readouterr().out


def test_tests_that_take_too_long_are_a_failure_and_the_rest_goes_on(load_tool, monkeypatch, capsys):
    tool, done = load_tool("gpu"), []
    monkeypatch.setattr(tool, "CHECKING", 0.01)
    for step in ("tune", "measure", "train"):
        monkeypatch.setattr(tool, step, lambda *_, step=step: done.append(step))
    assert tool.main(["--dry-run"]) == 1
    assert done == ["tune", "measure", "train"]
    assert "the tests were not done after 0.01 seconds and were stopped" in capsys.readouterr().out
