import math
from pathlib import Path

import pytest
import timm
import torch
from short_runs import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zoo.mm import evaluate, train
from zoo.mm.checkpoint import TEMPORARY, load_from_local

# Ends the process as `kill -9` would: first within the second epoch, then within the writing of its checkpoint.
KILL_IN_EPOCH = """
import os, signal, sys
from mmengine.hooks import Hook
from zoo.mm import hooks, train
step = hooks.IterationSeedHook.before_train_iter
def kill(self, runner, batch_idx, data_batch=None):
    if runner.iter == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, runner, batch_idx, data_batch)
hooks.IterationSeedHook.before_train_iter = kill
train("biformer_nano_digits", work_dir=sys.argv[1], cfg_options=sys.argv[2:])
"""
KILL_IN_WRITING = """
import os, signal, sys
from zoo.mm import checkpoint, train
replace = os.replace
def kill(source, target):
    if str(target).endswith("epoch_2.pth"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
checkpoint.os.replace = kill
train("biformer_nano_digits", work_dir=sys.argv[1], resume="auto", cfg_options=sys.argv[2:])
"""


@pytest.mark.long
def test_killed_twice_and_resumed_ends_with_the_same_weights(python, tmp_path):
    options = [*TINY[2:4], *TINY[6:], "train_dataloader.num_workers=2", "train_cfg.max_epochs=3", "train_cfg.val_interval=1",
               "model.args.drop_path_rate=0.2", "model.mixup.prob=1.0"]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    python("-m", "zoo", "train", "biformer_nano_digits", "--work-dir", unbroken, "--cfg-options", *options)

    python("-c", KILL_IN_EPOCH, broken, *options, code=-9)
    assert (broken / "last_checkpoint").read_text().endswith("epoch_1.pth")
    assert not (broken / "epoch_2.pth").exists()
    python("-c", KILL_IN_WRITING, broken, *options, code=-9)
    assert list(broken.glob(f"{TEMPORARY}*"))
    assert not (broken / "epoch_2.pth").exists()
    assert load_from_local(broken / "epoch_1.pth")["meta"]["epoch"] == 1

    done = python("-m", "zoo", "train", "biformer_nano_digits", "--work-dir", broken, "--resume", "--cfg-options", *options)
    assert "going on after epoch 1/3" in done.stdout and str(broken) in done.stdout.splitlines()[-1]
    assert not list(broken.glob(f"{TEMPORARY}*"))
    ends = [load_from_local(folder / "epoch_3.pth") for folder in (unbroken, broken)]
    for part in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(ends[0][part][name], ends[1][part][name]) for name in ends[0][part]), part
    states = [end["optimizer"]["state"] for end in ends]
    assert all(torch.equal(states[0][key]["exp_avg_sq"], states[1][key]["exp_avg_sq"]) for key in states[0])


def test_a_run_leaves_averaged_weights_a_record_and_scalars(tiny_train):
    checkpoint, metrics, folder = tiny_train("run", "train_cfg.val_interval=1")
    weights, other = checkpoint["state_dict"], checkpoint["ema_state_dict"]  # the engine keeps the raw weights in the latter
    raw = {name.removeprefix("module."): value for name, value in other.items() if name.startswith("module.")}
    assert set(raw) == set(weights) and not torch.equal(raw["model.head.weight"], weights["model.head.weight"])
    assert evaluate("biformer_nano_digits", folder / "epoch_2.pth", cfg_options=TINY) == metrics

    assert checkpoint["zoo"] == {
        "task": "classification", "model": "test_vit",
        "model_args": {"num_classes": 10, "in_chans": 1, "img_size": 32, "drop_path_rate": 0.1},
        "classes": [str(digit) for digit in range(10)], "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,),
        "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}

    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents*"))))
    events.Reload()
    assert {"loss", "lr", "accuracy/top1"} <= set(events.Tags()["scalars"])
    assert events.Scalars("accuracy/top1")[-1].value == pytest.approx(metrics["accuracy/top1"])
    assert "eta: 0:00" in next(folder.rglob("*.log")).read_text()


def test_the_average_is_the_one_asked_for(tiny_train, monkeypatch):
    from zoo.mm.hooks import ModelEMAHook

    heads = []
    update = ModelEMAHook.after_train_iter
    monkeypatch.setattr(ModelEMAHook, "after_train_iter", lambda self, runner, **kwargs: (
        update(self, runner, **kwargs), heads.append(runner.model.model.head.weight.detach().clone())))
    checkpoint, _, _ = tiny_train("ema", "custom_hooks.0.decay=0.7")
    average = heads[0]
    for head in heads[1:]:
        average = 0.7 * average + 0.3 * head
    torch.testing.assert_close(checkpoint["state_dict"]["model.head.weight"], average)


@pytest.mark.parametrize("report", ["weights", "both"])
def test_weights_are_reported_and_their_average_is_kept_beside(tiny_train, report):
    options = ["custom_hooks.0.decay=0.5", "train_cfg.val_interval=1"]
    average, own, _ = tiny_train("average", *options)
    checkpoint, metrics, folder = tiny_train("reported", *options, f"custom_hooks.0.report={report}")
    for name, value in checkpoint["state_dict"].items():  # the same run, told the other way round
        assert torch.equal(value, average["ema_state_dict"][f"module.{name}"])
        assert torch.equal(checkpoint["ema_state_dict"][f"module.{name}"], average["state_dict"][name])
    assert evaluate("biformer_nano_digits", folder / "epoch_2.pth", cfg_options=TINY) == {
        name: value for name, value in metrics.items() if not name.endswith("_ema")}
    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents*"))))
    events.Reload()
    if report == "both":
        assert {f"{name}_ema": value for name, value in own.items()}.items() <= metrics.items()
        assert events.Scalars("accuracy/top1_ema")[-1].value == pytest.approx(own["accuracy/top1"])
    else:
        assert not any(name.endswith("_ema") for name in metrics)


def test_the_best_by_weights_and_by_average_are_kept(tmp_path):
    base = Path(__file__).parents[2] / "configs" / "classification" / "biformer_nano_digits.py"
    (tmp_path / "both.py").write_text(
        f"_base_ = '{base}'\ndefault_hooks = dict(checkpoint=dict(save_best=['accuracy/top1', 'accuracy/top1_ema'], rule='greater'))\n")
    options = ["custom_hooks.0.report=both", "custom_hooks.0.decay=0.9", "train_cfg.val_interval=1"]
    train(tmp_path / "both.py", work_dir=tmp_path / "run", cfg_options=[*TINY, f"experiment_name={tmp_path.name}", *options])
    for name in ("top1", "top1_ema"):
        best, = (tmp_path / "run").glob(f"best_accuracy_{name}_epoch_?.pth")
        assert best.with_suffix(".safetensors").exists()


def test_resumed_training_tells_weights_and_average_apart(tiny_train, tmp_path):
    """Whichever of them the checkpoint reports, and whichever the resumed run does."""
    options = ["custom_hooks.0.decay=0.5", "train_cfg.max_epochs=3", "train_cfg.val_interval=3"]
    whole, _, _ = tiny_train("whole", *options)
    _, _, first = tiny_train("first", *options, "custom_hooks.0.report=weights")
    for report, kept in (("average", whole["state_dict"]), ("weights", _without_module(whole["ema_state_dict"]))):
        resumed, _, _ = tiny_train(f"resumed-{report}", *options, f"custom_hooks.0.report={report}", resume=first / "epoch_2.pth")
        other = whole["state_dict"] if report == "weights" else _without_module(whole["ema_state_dict"])
        for found, expected in ((resumed["state_dict"], kept), (_without_module(resumed["ema_state_dict"]), other)):
            assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def _without_module(state: dict) -> dict:
    return {name.removeprefix("module."): value for name, value in state.items() if name.startswith("module.")}


def test_learning_rate_warms_up_and_follows_a_cosine(tiny_train):
    _, _, folder = tiny_train("lr", "train_cfg.max_epochs=6", "train_cfg.val_interval=6", "default_hooks.logger.interval=1",
                              "train_dataloader.batch_size=32", "param_scheduler.0.start_factor=0.1")
    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents*"))))
    events.Reload()
    found = [event.value for event in events.Scalars("lr")]
    warm, total, peak = 4, 12, 2e-3  # steps: two of six epochs, two steps each
    ramp = [peak * (0.1 + 0.9 * step / (warm - 1)) for step in range(warm)]
    fall = [peak * (0.01 + 0.99 * (1 + math.cos(math.pi * step / (total - warm))) / 2) for step in range(total - warm)]
    assert found == pytest.approx(ramp + fall, rel=1e-4)


def test_accumulation_equals_a_larger_batch(tiny_train):
    plain = ["model.mixup=None", "model.args.drop_path_rate=0.0", "optim_wrapper.optimizer={'type': 'SGD', 'lr': 0.05}",
             "param_scheduler=[]"]
    large, _, _ = tiny_train("large", "train_dataloader.batch_size=32", *plain)
    small, _, _ = tiny_train("small", "optim_wrapper.accumulative_counts=2", *plain)
    single, _, _ = tiny_train("single", *plain)
    raw = [end["ema_state_dict"]["module.model.head.weight"] for end in (large, small, single)]
    torch.testing.assert_close(raw[0], raw[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(raw[0], raw[2], atol=1e-4)


def test_batch_size_scales_the_learning_rate(tiny_train):
    checkpoint, _, _ = tiny_train("scaled", "auto_scale_lr={'enable': True, 'base_batch_size': 64}", "param_scheduler=[]",
                                  "optim_wrapper.accumulative_counts=2")
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(2e-3 * 32 / 64)


def test_amp_trains_on_the_cpu(tiny_train):
    checkpoint, metrics, _ = tiny_train("amp", amp=True)
    assert checkpoint["optimizer"]["loss_scaler"] == {} and "accuracy/top1" in metrics
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_old_checkpoints_go_and_the_best_stays(tiny_train):
    _, _, folder = tiny_train("keep", "train_cfg.max_epochs=4", "default_hooks.checkpoint.max_keep_ckpts=2")
    assert {path.name for path in folder.glob("*.pth") if not path.name.startswith("best")} == {"epoch_3.pth", "epoch_4.pth"}
    assert len(list(folder.glob("best_accuracy_top1_*.pth"))) == 1
    assert {path.stem for path in folder.glob("*.safetensors")} == {path.stem for path in folder.glob("*.pth")}


def test_weights_beside_a_checkpoint_are_those_evaluated_and_timm_reads_them(tiny_train):
    args = {"num_classes": 10, "in_chans": 1}
    checkpoint, _, folder = tiny_train("beside", "model.name=biformer_nano", f"model.args={args}", "train_cfg.val_interval=1")
    assert "ema_state_dict" in checkpoint  # the average is what is evaluated
    for path in folder.glob("*.safetensors"):
        evaluated = load_from_local(path.with_suffix(".pth"))["state_dict"]
        for how in (dict(checkpoint_path=path), *(dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
                                                  for file in (path, path.with_suffix(".pth")))):
            weights = timm.create_model("biformer_nano", **how, **args).state_dict()
            assert all(torch.equal(value, evaluated[f"model.{name}"]) for name, value in weights.items())
    assert len(list(folder.glob("*.safetensors"))) == 3  # two epochs and the best


def test_resuming_a_finished_run_gives_its_metrics(tiny_train):
    _, metrics, _ = tiny_train("done")
    _, again, _ = tiny_train("done", "experiment_name=again", resume="auto")
    assert again == metrics


def test_two_processes_agree_with_one(python, tiny_train, tmp_path):
    same = ["model.mixup=None", "model.args.drop_path_rate=0.0", "optim_wrapper.optimizer={'type': 'SGD', 'lr': 0.05}"]
    one, _, _ = tiny_train("one", *same)
    two = tmp_path / "two"
    python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "zoo", "train", "biformer_nano_digits",
           "--work-dir", two, "--cfg-options", *TINY, *same, "train_dataloader.batch_size=8", "val_dataloader.dataset.limit=41")
    both = load_from_local(two / "epoch_2.pth")
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], value, atol=1e-5, rtol=1e-4)


def test_the_digits_config_runs_in_two_processes(python, tmp_path):
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "zoo", "train", "biformer_nano_digits",
                  "--work-dir", tmp_path, "--cfg-options", "train_cfg.max_epochs=1", "train_dataloader.dataset.limit=128",
                  "train_dataloader.batch_size=16", "val_dataloader.dataset.limit=41", "report=True")
    checkpoint = load_from_local(tmp_path / "epoch_1.pth")
    assert checkpoint["meta"]["iter"] == 4
    single = evaluate("biformer_nano_digits", tmp_path / "epoch_1.pth", cfg_options=["test_dataloader.dataset.limit=41"])
    assert f"accuracy/top1 {single['accuracy/top1']:.2f}" in done.stdout
    assert done.stdout.count("report: ") == 1 and f">{single['accuracy/top1']:.1f}%<" in (tmp_path / "report.html").read_text()


def test_image_folders_train_with_the_imagenet_recipe(tmp_path):
    from PIL import Image

    for split, name, colour in [(s, n, c) for s in ("train", "val") for n, c in (("cat", 40), ("dog", 220))]:
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (48, 40), (colour, index * 30, 100)).save(tmp_path / "data" / split / name / f"{index}.jpg")
    size = ["train_dataloader.dataset.transform.input_size=32", "val_dataloader.dataset.transform.input_size=32",
            "train_dataloader.batch_size=8", "train_dataloader.num_workers=1", "val_dataloader.num_workers=0",
            "val_dataloader.persistent_workers=False"]
    _, metrics = train("biformer_tiny_in1k", work_dir=tmp_path / "run", cfg_options=[
        "model.name=biformer_nano", "model.args.num_classes=2", f"data_root={tmp_path / 'data'}", "train_cfg.max_epochs=1", *size])
    assert set(metrics) == {"accuracy/top1"}
    assert Path(tmp_path / "run" / "epoch_1.pth").exists()


def test_full_disk_is_one_sentence_and_leaves_no_half_checkpoint(tmp_path, full_disk):
    from zoo.errors import InputError
    from zoo.mm.checkpoint import AtomicBackend

    with full_disk(), pytest.raises(InputError, match=r"cannot write .*epoch_1.pth: File too large"):
        AtomicBackend().put(bytes(10_000), tmp_path / "epoch_1.pth")
    assert not list(tmp_path.iterdir())
