"""What `zoo train` and `zoo test` answer to input that cannot be used."""
from pathlib import Path

import pytest
import timm
import torch

import zoo.mm  # noqa: F401  so that the first test is not the slow one
from zoo.tools._cli import command

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs/classification/biformer_nano_digits.py"


def _fails(capfd, program: str, *arguments: object) -> str:
    """Runs a program; checks the manner of its failure and returns its one line."""
    with pytest.raises(SystemExit) as end:
        command([program, *map(str, arguments)])
    lines = capfd.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(("arguments", "message"), [
    (["biformer_nano_digit"], "did you mean biformer_nano_digits"),
    (["configs/classification/biformer_nano_digit.py"], "did you mean biformer_nano_digits"),
    ([DIGITS, "--cfg-options", "trian_cfg.max_epochs=1"], "did you mean train_cfg"),
    ([DIGITS, "--cfg-options", "epochs=1"], "unknown key 'epochs'"),
    ([DIGITS, "--cfg-options", "train_cfg.max_epoch=1"], "did you mean max_epochs"),
    ([DIGITS, "--cfg-options", "train_cfg.max_epochs=many"], "'many' cannot replace"),
    ([DIGITS, "--cfg-options", "optim_wrapper.optimizer.learning_rate=1"], "'learning_rate'"),
    ([DIGITS, "--cfg-options", "optim_wrapper.clip_grad.norm=1"], "did you mean max_norm"),
    ([DIGITS, "--cfg-options", "optim_wrapper.paramwise_cfg={'layer_deacy': 0.5}"], "layer_deacy"),
    ([DIGITS, "--cfg-options", "param_scheduler.7.begin=1"], "no index below 2"),
    ([DIGITS, "--cfg-options", "custom_hooks.0.type=ModelEMAHok"], "did you mean ModelEMAHook"),
    ([DIGITS, "--cfg-options", "train_dataloader.dataset.limt=1"], "did you mean limit"),
    ([DIGITS, "--cfg-options", "train_dataloader.dataset.transform.input_siz=1"], "input_siz"),
    ([DIGITS, "--cfg-options", "train_dataloader.sampler.repeat=2"], "did you mean repeats"),
    ([DIGITS, "--cfg-options", "model.args.num_classes=7"], "the model has 7 classes"),
    ([DIGITS, "--cfg-options", "model.name=biformer_nan"], "did you mean biformer_nano"),
    ([DIGITS, "--cfg-options", "model.args.head_size=3"], "head_size"),
    ([DIGITS, "--cfg-options", "nonsense"], "KEY=VALUE"),
    ([DIGITS, "--cfg-options", "data_root=/mine"], "without effect: DigitsDataset of biformer_nano_digits reads no files"),
    ([DIGITS, "--cfg-options", "resume=True"], "resume=True is without effect in the config; --resume says so"),
    ([DIGITS, "--resume", "nowhere.pth"], "no checkpoint nowhere.pth"),
    ([DIGITS, "--cfg-options", "load_from=nowhere.pth"], "no checkpoint nowhere.pth"),
    ([DIGITS, "--cfg-options", "train_dataloader.num_workers=0"], "persistent_workers"),
    ([DIGITS, "--work-dir", DIGITS], "is a file"),
    ([DIGITS, "--launcher", "slurm"], "SLURM_PROCID"),
    (["biformer_tiny_in1k", "--cfg-options", "data_root=/nowhere", "model.name=biformer_nano"], "no data folder /nowhere"),
])
def test_train_refuses(arguments, message, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in _fails(capfd, "train", *arguments)
    assert not list(tmp_path.iterdir())


def test_variables_of_a_configs_own_begin_with_an_underscore(monkeypatch, capfd, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(f"_base_ = {str(DIGITS)!r}\n_epochs = 'many'\ntrain_cfg = dict(max_epochs=_epochs)\nrandomness = dict(sed=0)\n")
    assert "randomness has an unknown key 'sed'; did you mean seed" in _fails(capfd, "train", config)
    config.write_text(config.read_text().replace("_epochs", "epochs"))
    assert "the config has an unknown key 'epochs'" in (said := _fails(capfd, "train", config))
    assert said.endswith("; a variable of your own begins with an underscore")


class Payload:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def _weights() -> dict[str, torch.Tensor]:
    network = timm.create_model("biformer_nano", num_classes=10, in_chans=1)
    return {f"model.{name}": value for name, value in network.state_dict().items()}


def _truncated(path: Path) -> str:
    torch.save({"state_dict": {"a": torch.rand(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    return "is damaged"


def _foreign(path: Path) -> str:
    torch.save({"state_dict": {"weight": torch.rand(3)}, "meta": {"epoch": 1, "iter": 1}, "message_hub": {}, "optimizer": {},
                "param_schedulers": []}, path)
    return "weights"


def _not_a_dict(path: Path) -> str:
    torch.save([torch.rand(3)], path)
    return "not a checkpoint"


def _running_code(path: Path) -> str:
    torch.save({"state_dict": _weights(), "meta": {"epoch": 1, "iter": 1}, "message_hub": Payload(path.parent / "executed")}, path)
    return "would run code"


def _running_code_by_getattr(path: Path) -> str:
    class Reach:
        def __reduce__(self) -> tuple:
            from mmengine.logging import HistoryBuffer
            return getattr, (HistoryBuffer, "__init__")

    torch.save({"state_dict": {}, "message_hub": Reach()}, path)
    return "is damaged"


@pytest.mark.parametrize("make", [_truncated, _foreign, _not_a_dict, _running_code, _running_code_by_getattr])
@pytest.mark.parametrize("way", ["test", "resume", "resume newest", "load_from"])
def test_bad_checkpoints_are_refused(make, way, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pth"
    message = make(bad)
    if way == "test":
        line = _fails(capfd, "test", DIGITS, bad)
    elif way == "resume":
        line = _fails(capfd, "train", DIGITS, "--resume", bad)
    elif way == "resume newest":
        (tmp_path / "last_checkpoint").write_text(str(bad))
        line = _fails(capfd, "train", DIGITS, "--work-dir", tmp_path, "--resume")
    else:
        line = _fails(capfd, "train", DIGITS, "--cfg-options", f"load_from={bad}")
    assert message in line and "bad.pth" in line
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.pth", "last_checkpoint"}


@pytest.mark.parametrize(("more", "message"), [
    ({}, "lacks epoch, iter, message_hub, optimizer"),
    ({"meta": {"epoch": 1, "iter": 1}, "message_hub": {}, "optimizer": {"state": {}, "param_groups": []}, "param_schedulers": []},
     "its optimizer is not the config's"),
])
def test_what_training_cannot_go_on_from(more, message, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _weights(), **more}, "bad.pth")
    assert message in _fails(capfd, "train", DIGITS, "--resume", "bad.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_config_text_in_a_checkpoint_is_not_executed(tmp_path):
    from zoo.mm.checkpoint import load_from_local

    torch.save({"state_dict": {}, "meta": {"config": f"open({str(tmp_path / 'executed')!r}, 'w')", "epoch": 1}}, tmp_path / "a.pth")
    assert load_from_local(tmp_path / "a.pth")["meta"] == {"epoch": 1}
