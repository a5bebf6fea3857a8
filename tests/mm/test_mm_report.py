"""The page that a training leaves: of a run that was gone on with, of odd data, and when something goes wrong with it."""
import importlib
import math

import numpy as np
import pytest
import torch
from html_pages import Page
from PIL import Image
from short_runs import TINY

from zoo.errors import InputError
from zoo.mm import metrics, report, train
from zoo.mm.checkpoint import best_checkpoint, latest_checkpoint, load_from_local
from zoo.mm.report import write_report
from zoo.reading.scalars import read_scalars

SHORT = [*TINY, "train_cfg.val_interval=1", "default_hooks.logger.interval=2", "report=True"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Two epochs, and a third after them, on digits of which the first twelve are held out."""
    folder = tmp_path_factory.mktemp("report") / "run"
    options = [*SHORT, "val_dataloader.dataset.limit=12", "test_dataloader.dataset.limit=12"]
    train("biformer_nano_digits", work_dir=folder, cfg_options=[*options, "experiment_name=report-first"])
    first = (folder / "report.html").read_text()
    _, found = train("biformer_nano_digits", work_dir=folder, resume="auto",
                     cfg_options=[*options, "experiment_name=report-second", "train_cfg.max_epochs=3"])
    return folder, first, found


def test_a_training_leaves_its_page(resumed):
    folder, first, found = resumed
    page = Page(folder / "report.html")
    assert Page(first).says(" of 2") and f"{best_checkpoint(folder).stem[-1]} of 3" in page.texts
    best = max(value for _, value in read_scalars(folder).held_out["accuracy/top1"])
    assert f"{best:.1f}%" in page.texts and page.says("the best by accuracy/top1") and page.says("test_vit, 0.")
    assert page.says("64 samples to train on, 12 held out") and page.says("in 2 runs")
    assert page.says(f"zoo train {folder / 'biformer_nano_digits.py'} --work-dir {folder} --resume --cfg-options train_cfg.max_epochs=6")
    assert page.says(f"zoo predict {best_checkpoint(folder)} pictures/")
    assert {"accuracy, held-out data, %", "loss, in training", "learning rate", "norm of the gradients"} <= set(page.texts)
    assert page.says("The validation data hold nothing of ") and len(page.text) < 1_000_000
    wrong = round(12 * (1 - best / 100))
    assert len(page.pictures) == wrong and all(picture.size == (32, 32) for _, picture in page.pictures)


def test_curves_of_a_run_that_was_gone_on_with_have_every_point_once(resumed):
    scalars = read_scalars(resumed[0])
    assert [step for step, _ in scalars.train["loss"]] == [2, 4, 6, 8, 10, 12]
    assert [epoch for epoch, _ in scalars.held_out["accuracy/top1"]] == [1, 2, 3]


def test_the_best_checkpoint_is_the_one_that_the_newest_records(resumed, tmp_path):
    folder = resumed[0]
    assert best_checkpoint(folder).name.startswith("best_accuracy_top1_epoch_")
    newest = load_from_local(latest_checkpoint(folder))
    torch.save({"state_dict": {}, "message_hub": {"runtime_info": newest["message_hub"]["runtime_info"]}}, tmp_path / "epoch_3.pth")
    (tmp_path / "last_checkpoint").write_text("/moved/since/epoch_3.pth")
    assert best_checkpoint(tmp_path) == tmp_path / "epoch_3.pth"  # the best one is gone
    (tmp_path / best_checkpoint(folder).name).touch()
    (tmp_path / "best_of_another_run.pth").touch()
    assert best_checkpoint(tmp_path) == tmp_path / best_checkpoint(folder).name


def test_the_program_reports_on_the_checkpoint_that_is_asked_for(resumed, capsys):
    folder, _, _ = resumed
    importlib.import_module("zoo.tools.report").main([str(folder), "--checkpoint", str(folder / "epoch_1.pth")])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {folder / 'report.html'}"
    assert Page(folder / "report.html").says("epoch_1.pth, of epoch 1")


def test_numbers_that_are_none_are_said(resumed, monkeypatch):
    monkeypatch.setattr(metrics.Accuracy, "compute_metrics", lambda self, results: {"top1": math.nan})
    page = Page(write_report(resumed[0]))
    assert "not a number" in page.texts and "accuracy/top1 is not a finite number." in page.texts


def test_answers_of_weights_that_have_diverged_are_refused(resumed, tmp_path):
    weights = load_from_local(best_checkpoint(resumed[0]))
    weights["state_dict"]["model.head.weight"].fill_(math.inf)
    torch.save(weights, tmp_path / "diverged.pth")
    with pytest.raises(InputError, match="the scores of sample 0 are not finite numbers"):
        write_report(resumed[0], tmp_path / "diverged.pth")


def test_other_numbers_than_training_logged_are_said(resumed, monkeypatch):
    monkeypatch.setattr(metrics.Accuracy, "compute_metrics", lambda self, results: {"top1": 101.0})
    assert Page(write_report(resumed[0])).says("accuracy/top1 is 101 here, and training logged")


@pytest.fixture
def folders(tmp_path):
    """Class folders with odd names."""
    data = tmp_path / "data"
    generator = np.random.default_rng(0)
    for name in ("<b>bold", "a&amp;b 'c' \"d\"", "猫"):
        for split in ("train", "val"):
            (data / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(generator.integers(0, 256, (40, 50), np.uint8)).save(data / split / name / f"{i} & <i>.png")
    return data


def _folder_options(data, classes, *more):
    transform = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    dataset = {"type": "ImageFolderDataset", "root": str(data)}
    return ["model.name=test_vit", f"model.args={{'num_classes': {classes}, 'in_chans': 1, 'img_size': 32}}", "model.mixup=None",
            "train_dataloader.batch_size=4", "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False",
            "train_cfg.max_epochs=1", "train_cfg.val_interval=1", "report=True",
            f"train_dataloader.dataset={dataset | {'split': 'train', 'transform': {'is_training': True, **transform}}!r}",
            *(f"{part}_dataloader.dataset={dataset | {'split': 'val', 'transform': transform}!r}" for part in ("val", "test")), *more]


def test_class_folders_with_odd_names(folders, tmp_path):
    train("biformer_nano_digits", work_dir=tmp_path / "run", cfg_options=_folder_options(folders, 3, "experiment_name=report-odd"))
    page = Page(tmp_path / "run" / "report.html")
    assert {"<b>bold", "a&amp;b 'c' \"d\"", "猫"} <= set(page.texts) and "b" not in page.tags
    assert page.says(f"test_vit on {folders / 'train'}") and page.says(" & <i>.png: answered ")
    assert page.pictures and not page.says("hold nothing of")


def test_one_class_only(folders, tmp_path):
    for path in [*folders.glob("*/<b>*"), *folders.glob("*/a*")]:
        path.rename(tmp_path / f"{path.parent.name} {path.name}")
    train("biformer_nano_digits", work_dir=tmp_path / "run", cfg_options=_folder_options(folders, 1, "experiment_name=report-one"))
    page = Page(tmp_path / "run" / "report.html")
    assert page.says("No answer is wrong.") and not page.pictures and page.texts.count("猫") >= 2


def test_a_run_without_validation(tmp_path):
    options = [option for option in TINY if not option.startswith(("val_", "test_", "train_cfg.val"))]
    none = [f"{part}_{key}=None" for part in ("val", "test") for key in ("dataloader", "cfg", "evaluator")]
    train("biformer_nano_digits", work_dir=tmp_path, cfg_options=[
        *options, *none, "report=True", "experiment_name=report-no-validation"])
    page = Page(tmp_path / "report.html")
    assert page.says("The config has no validation data") and "table" not in page.tags and not page.pictures
    assert "loss, in training" in page.texts and page.says("epoch_2.pth, of epoch 2")


def test_a_page_that_fails_does_not_lose_the_training(tmp_path, monkeypatch):
    def fails(work_dir):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(report, "write_report", fails)
    folder, found = train("biformer_nano_digits", work_dir=tmp_path, cfg_options=[*SHORT, "train_cfg.max_epochs=1",
                                                                                  "experiment_name=report-fails"])
    assert "accuracy/top1" in found and latest_checkpoint(folder).name == "epoch_1.pth"
    said = next(line for line in next(tmp_path.rglob("*.log")).read_text().splitlines() if "ERROR" in line)
    assert "the training is complete, but its report could not be written: out of luck; `zoo report" in said


def test_what_no_page_can_be_written_of(resumed, tmp_path):
    with pytest.raises(InputError, match="there is no work dir .*/rin; did you mean run"):
        write_report(resumed[0].parent / "rin")
    with pytest.raises(InputError, match="holds no config: it is no work dir of `zoo train`"):
        write_report(tmp_path)
    (tmp_path / "config.py").write_text("model = dict()")
    with pytest.raises(InputError, match="holds no checkpoint yet: there is nothing to report"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="nowhere.pth"):
        write_report(resumed[0], "nowhere.pth")
    with pytest.raises(InputError, match="report in the config is 'yes', where True or False is needed"):
        train("biformer_nano_digits", work_dir=tmp_path / "never", cfg_options=["report=yes"])
    assert not (tmp_path / "never").exists() and not (tmp_path / "report.html").exists()
