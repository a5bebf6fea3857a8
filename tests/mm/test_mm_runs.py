"""What every run has: schedules that are the config's after resuming, hooks of the house, a stop at numbers that are not finite, lines."""
import json
import math
import re

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from short_runs import TINY

from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.mm import evaluate
from zoo.mm.checkpoint import latest_checkpoint, load_from_local
from zoo.mm.classifier import ImageClassifier
from zoo.mm.config import load_config
from zoo.mm.hooks import IterationSeedHook

SCHEDULES = {
    "steps of a warm-up and a cosine": [
        {"type": "LinearLR", "start_factor": 0.1, "begin": 0, "end": 1, "convert_to_iter_based": True},
        {"type": "CosineAnnealingLR", "eta_min_ratio": 0.01, "begin": 1, "convert_to_iter_based": True}],
    "steps of a warm-up, and epochs": [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 3},
        {"type": "PolyLR", "eta_min": 1e-5, "power": 0.9}],
    "milestones, and momentum": [
        {"type": "MultiStepLR", "milestones": [1, 3], "gamma": 0.1},
        {"type": "CosineAnnealingMomentum", "eta_min": 0.5, "convert_to_iter_based": True}],
    "epochs of timm's cosine": [{"type": "WarmupCosineLR", "warmup_epochs": 1, "warmup_lr": 1e-6, "min_lr": 1e-5, "lag": 1}],
    "one cycle": [{"type": "OneCycleLR", "eta_max": 0.01, "convert_to_iter_based": True}],
}
SMALL = ["train_dataloader.dataset.limit=32", "val_dataloader.dataset.limit=8", "train_cfg.val_interval=9", "custom_hooks=[]",
         "optim_wrapper.paramwise_cfg={'layer_decay': 0.5}"]


@pytest.fixture
def rates(tiny_train, monkeypatch):
    """Trains, and returns what the groups of parameters had at every step, by epoch and step."""
    found = {}
    seed = IterationSeedHook.before_train_iter

    def noted(self, runner, batch_idx, data_batch=None):
        seed(self, runner, batch_idx, data_batch)
        found[runner.epoch, runner.iter] = [{key: group[key] for key in ("lr", "betas", "weight_decay")}
                                            for group in runner.optim_wrapper.param_groups]

    monkeypatch.setattr(IterationSeedHook, "before_train_iter", noted)

    def run(name, *options, **arguments):
        found.clear()
        _, _, folder = tiny_train(name, *SMALL, *options, **arguments)
        return dict(found), folder

    return run


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_for_more_epochs_rates_are_those_of_an_unbroken_run(rates, schedule):
    options = [f"param_scheduler={SCHEDULES[schedule]}"]
    unbroken, _ = rates("unbroken", *options, "train_cfg.max_epochs=5")
    first, folder = rates("first", *options, "train_cfg.max_epochs=2")
    resumed, _ = rates("resumed", *options, "train_cfg.max_epochs=5", resume=folder / "epoch_2.pth")
    assert len(first) == 4 and len(resumed) == 6 and len({groups[0]["lr"] for groups in unbroken.values()}) > 2
    assert resumed == {place: unbroken[place] for place in resumed}


def test_resumed_with_another_batch_rate_and_decay_they_are_the_configs(rates):
    """Also the scale of the rate that comes with the batch, and the number of the step that resuming begins with."""
    scaled = ["auto_scale_lr={'enable': True, 'base_batch_size': 64}"]
    other = ["train_dataloader.batch_size=8", "optim_wrapper.optimizer.lr=0.01", "optim_wrapper.optimizer.weight_decay=0.2",
             "train_cfg.max_epochs=3"]
    unbroken, _ = rates("unbroken", *scaled, *other)
    _, folder = rates("first", *scaled)
    resumed, again = rates("resumed", *scaled, *other, resume=folder / "epoch_2.pth")
    assert resumed == {place: unbroken[place] for place in resumed} and list(resumed) == [(2, step) for step in range(8, 12)]
    assert load_from_local(again / "epoch_3.pth")["meta"]["iter"] == 12


def test_a_schedule_that_looks_at_metrics_goes_on_as_it_was(rates):
    options = ["param_scheduler=[{'type': 'ReduceOnPlateauLR', 'monitor': 'accuracy/top5', 'rule': 'less', 'patience': 0, 'factor': 0.5}]",
               "train_cfg.val_interval=1"]
    unbroken, _ = rates("unbroken", *options, "train_cfg.max_epochs=4")
    _, folder = rates("first", *options)
    resumed, _ = rates("resumed", *options, "train_cfg.max_epochs=4", resume=folder / "epoch_2.pth")
    assert resumed == {place: unbroken[place] for place in resumed}


@HOOKS.register_module()
class CountingHook(Hook):
    """A hook that a user has."""

    steps = 0

    def after_train_iter(self, *args, **kwargs):
        CountingHook.steps += 1


@pytest.mark.parametrize("options", [
    ["custom_hooks=[{'type': 'CountingHook'}]"], ["custom_hooks=[{'type': 'CountingHook'}]", "visualizer=None"],
    ["custom_hooks=[{'type': 'CountingHook'}, {'type': 'RecordHook', 'priority': 'LOWEST'}]", "default_hooks={}", "randomness=None"],
    ["custom_hooks=[{'type': 'CountingHook'}]", "default_hooks={'checkpoint': {'type': 'CheckpointHook', 'interval': 1}}",
     "visualizer={'type': 'Visualizer'}", "randomness={'deterministic': True}"],
])
def test_hooks_of_the_house_are_there_whatever_the_config_says_of_hooks(tiny_train, options):
    CountingHook.steps = 0
    checkpoint, metrics, folder = tiny_train("run", *options)
    assert CountingHook.steps == 8
    assert checkpoint["zoo"]["model"] == "test_vit" and checkpoint["meta"]["seed"] == 0
    best, = folder.glob("best_accuracy_top1_*.pth")
    for path in (best, folder / "epoch_2.pth"):
        model, info = load_trained(path)
        assert info.classes == tuple("0123456789") and path.with_suffix(".safetensors").exists()
    assert evaluate("biformer_nano_digits", best, cfg_options=TINY) == metrics
    assert next(folder.rglob("events.out.tfevents*"))


def test_the_config_that_a_run_leaves_is_that_of_the_run(tiny_train):
    _, _, folder = tiny_train("run", "train_cfg.max_epochs=1")
    left = load_config(folder / "biformer_nano_digits.py")
    assert [hook.type for hook in left.custom_hooks] == ["ModelEMAHook", "IterationSeedHook", "FiniteHook", "ScreenHook", "RecordHook"]


@pytest.mark.parametrize(("name", "best"), [
    ("biformer_tiny_in1k", "accuracy/top1"), ("attention_unet_digits", "iou/mean"), ("attention_unet3d_mni152", "dice/mean")])
def test_every_task_keeps_the_best_checkpoint(name, best):
    checkpoint = load_config(name).default_hooks.checkpoint
    assert (checkpoint.save_best, checkpoint.rule, checkpoint.type) == (best, "greater", "AtomicCheckpointHook")


def test_a_metric_that_is_not_measured_is_named(tiny_train):
    with pytest.raises(InputError, match="save_best='mIoU': the evaluation gives accuracy/top1, accuracy/top5"):
        tiny_train("run", "default_hooks.checkpoint.save_best=mIoU", "train_cfg.max_epochs=1")


def test_the_best_of_another_folder_is_left_there(tiny_train):
    options = ["train_cfg.val_interval=1", "custom_hooks=[]"]
    _, _, first = tiny_train("first", *options)
    best, = first.glob("best*.pth")
    _, _, other = tiny_train("other", *options, "train_cfg.max_epochs=4", "optim_wrapper.optimizer.lr=0.005", resume=first / "epoch_2.pth")
    assert best.exists() and best.with_suffix(".safetensors").exists() and len(list(other.glob("best*.pth"))) == 1


class Spoilt:
    """Makes the loss of a step, or what is predicted, not a number, or the weights after the last step."""

    def __init__(self, monkeypatch, step: int, what: str):
        self.calls, self.step, self.what = 0, step, what
        self.forward = forward = ImageClassifier.forward
        spoilt = self

        def spoil(self, inputs, targets=None, mode="tensor"):
            out = forward(self, inputs, targets, mode)
            if mode == "loss":
                spoilt.calls += 1
                if spoilt.calls == spoilt.step and spoilt.what == "loss":
                    out["loss"] = out["loss"] * math.nan
                if spoilt.calls == spoilt.step and spoilt.what == "gradient":  # a finite loss, whose gradient is not
                    out["loss"] = out["loss"] + torch.where(out["loss"] > 0, 0.0, (out["loss"] - out["loss"]).sqrt())
            elif spoilt.what == "outputs":
                for item in out:
                    item["scores"] = item["scores"] * math.inf
            return out

        monkeypatch.setattr(ImageClassifier, "forward", spoil)


@pytest.mark.parametrize(("what", "step", "message", "left"), [
    ("loss", 6, r"^training stopped at step 6, in epoch 2: loss nan; lower the rate, optim_wrapper\.optimizer\.lr", {"epoch_1"}),
    ("gradient", 3, r"^training stopped at step 4, in epoch 1: loss nan", set()),
    ("gradient", 8, r"^training stopped after step 8: \d+ of \d+ weights are not finite, such as model", {"epoch_1"}),
    ("outputs", 0, r"^the outputs for batch 1 of the evaluated data are not finite", {"epoch_1", "epoch_2"}),
])
def test_what_is_not_finite_stops_a_run_before_there_is_a_checkpoint_of_it(tiny_train, monkeypatch, tmp_path, what, step, message, left):
    Spoilt(monkeypatch, step, what)
    with pytest.raises(InputError, match=message):
        tiny_train("run", "optim_wrapper.clip_grad=None", "custom_hooks=[]")
    found = {path.stem for path in (tmp_path / "run").glob("*.pth")}
    assert found == left
    for name in found:
        state = load_from_local(tmp_path / "run" / f"{name}.pth")["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


def test_outputs_and_weights_that_are_not_finite_end_every_use(tiny_train, monkeypatch, tmp_path):
    """What a run of somebody else's left, and what comes of sound weights."""
    checkpoint, _, folder = tiny_train("run", "custom_hooks=[]")
    Spoilt(monkeypatch, 0, "outputs")
    with pytest.raises(InputError, match="the outputs for batch 1 of the evaluated data are not finite"):
        evaluate("biformer_nano_digits", folder / "epoch_2.pth", cfg_options=TINY)
    checkpoint["state_dict"]["model.head.bias"][3] = math.nan
    torch.save(checkpoint, tmp_path / "bad.pth")
    for use in (load_trained, lambda path: evaluate("biformer_nano_digits", path, cfg_options=TINY),
                lambda path: tiny_train("again", resume=path), lambda path: tiny_train("from", f"load_from={path}")):
        with pytest.raises(InputError, match=r"1 of \d+ weights in .*bad.pth are not numbers \(NaN\), such as .*head.bias: the run"):
            use(tmp_path / "bad.pth")


def test_inputs_that_are_not_finite_are_named_as_the_cause(tiny_train, monkeypatch):
    from zoo.mm.datasets import DigitsDataset

    item = DigitsDataset.__getitem__
    monkeypatch.setattr(DigitsDataset, "__getitem__", lambda self, sample: {**(got := item(self, sample)), "inputs": got["inputs"] / 0})
    with pytest.raises(InputError, match="at step 1, in epoch 1: loss nan; its inputs are not finite: mend the data"):
        tiny_train("run")


def test_the_screen_has_a_line_for_every_epoch_and_the_file_all(tiny_train, capfd):
    _, metrics, folder = tiny_train("run", "train_cfg.max_epochs=3", "default_hooks.logger.interval=2")
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 6 and "\r" not in said.err, said
    assert re.fullmatch(r"test_vit, 0\.\d\d million parameters, is trained on 64 samples of 10 classes \(0, 1, 2, 3, 4, …\); "
                        "evaluated on 40", lines[0])
    assert re.fullmatch(rf"3 epochs of 4 steps of 16 samples on cpu; the whole log: {folder}/.+\.log", lines[1])
    for epoch, line in enumerate(lines[2:5], 1):
        metric = r"  accuracy/top1 [\d.]+" if epoch > 1 else ""
        assert re.fullmatch(rf"epoch {epoch}/3  loss \d\.\d{{4}}{metric}  rate [\d.e-]+  0:\d\d:\d\d, 0:\d\d:\d\d left", line), line
    assert lines[4].endswith("0:00:00 left") and f"accuracy/top1 {metrics['accuracy/top1']:.4g}  " in lines[4]
    assert re.fullmatch(rf"best accuracy/top1: [\d.]+, {folder}/best_accuracy_top1_epoch_\d\.pth", lines[5])
    log = next(folder.rglob("*.log")).read_text()
    assert "System environment" in log and "Config:" in log and re.search(r"Epoch\(train\) +\[1\]\[2/4\]", log)
    scalars = [json.loads(line) for line in next(folder.rglob("scalars.json")).read_text().splitlines()]
    assert len([line for line in scalars if "loss" in line]) == 6


def test_a_loop_of_steps_has_a_line_for_every_validation(tiny_train, capfd):
    tiny_train("run", "train_cfg={'by_epoch': False, 'max_iters': 5, 'val_interval': 2}", "param_scheduler=[]",
               "log_processor={'by_epoch': False}", "default_hooks.checkpoint.by_epoch=False", "default_hooks.checkpoint.interval=5",
               "custom_hooks=[]")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert all("accuracy/top1" in line for line in lines[:2])


def test_resumed_runs_say_so(tiny_train, capfd):
    _, _, folder = tiny_train("run")
    tiny_train("run", "experiment_name=again", "train_cfg.max_epochs=3", resume="auto")
    assert ", going on after epoch 2/3; the whole log" in capfd.readouterr().out
    assert latest_checkpoint(folder) == folder / "epoch_3.pth"


@pytest.mark.parametrize(("threshold", "said"), [(2.0, 1), (0.5, 0)])
def test_a_loss_that_is_nothing_is_said_once(tiny_train, capfd, threshold, said):
    """As that of attention of a small transformer, none of which is above the threshold."""
    _, _, folder = tiny_train("run", "model.attention_diversification=1.0", f"model.attention_threshold={threshold}",
                              "optim_wrapper.optimizer.lr=1e-6")
    warning = "attention_similarity has been 0 at every step, and nothing is learned from it: no weight of attention is above"
    assert capfd.readouterr().out.count(warning) == next(folder.rglob("*.log")).read_text().count(warning) == said


def test_warnings_are_lines_of_the_log_and_said_once(tiny_train, monkeypatch, capfd):
    import warnings

    forward = ImageClassifier.forward

    def warning(self, *args, **kwargs):
        warnings.warn("something is odd,\n and this is why")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ImageClassifier, "forward", warning)
    _, _, folder = tiny_train("run")
    said = capfd.readouterr()
    assert said.out.count("WARNING: something is odd, and this is why\n") == 1 and not said.err
    assert next(folder.rglob("*.log")).read_text().count("something is odd, and this is why") == 1
