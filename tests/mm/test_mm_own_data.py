"""`zoo train MODEL DATA`: every kind of data, from files to a checkpoint that the other commands take."""
import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import timm
import torch
from html_pages import Page
from PIL import Image

from zoo.checkpoints import load_trained
from zoo.mm import evaluate, train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.config import load_config
from zoo.mm.downstream import load_scene_model
from zoo.mm.own_data import mirrors
from zoo.predicting.classification import predict
from zoo.reading.digits import write_digit_scenes
from zoo.tools import prune
from zoo.tools._cli import command


@pytest.fixture
def zoo_train(capfd, tmp_path) -> Callable[..., tuple[str, Path]]:
    """Runs `zoo train MODEL DATA …`; what it says, and the work dir."""
    def run(*arguments: object, work_dir: str = "run") -> tuple[str, Path]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            command(["train", *map(str, arguments), "--work-dir", str(tmp_path / work_dir)])
        said = capfd.readouterr()
        assert end.value.code in (None, 0), said.err[-3000:]
        assert f"report: {tmp_path / work_dir / 'report.html'}" in said.out, said.err[-3000:]
        page = Page(tmp_path / work_dir / "report.html")
        assert page.says(f" on {tmp_path}") and not page.says(f" on {tmp_path / work_dir}")
        return said.out, tmp_path / work_dir

    return run


@pytest.fixture
def zoo_refuses(capfd, tmp_path, monkeypatch) -> Callable[..., str]:
    """Runs `zoo train MODEL DATA …`, which has to end in one line and leave nothing."""
    def run(*arguments: object) -> str:
        before = set(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            command(["train", *map(str, arguments)])
        said = capfd.readouterr()
        assert end.value.code == 2 and len(said.err.splitlines()) == 1 and said.err.startswith("error: "), said
        assert set(tmp_path.rglob("*")) == before
        return said.err

    return run


def write_picture(path: Path, value: int | tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> None:
    """A noisy picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(path.as_posix().encode())).integers(-20, 20, (*size[::-1], 3))
    Image.fromarray((np.asarray(value) + noise).clip(0, 255).astype(np.uint8)).save(path)


def write_colours(root: Path, count: int = 12) -> Path:
    for place, name in enumerate(("blue", "green", "red")):
        for i in range(count):
            write_picture(root / name / f"{i}.png", tuple(np.roll((200, 30, 30), -place - 1)))
    return root


def test_class_folders_train_and_go_on(zoo_train, tmp_path):
    data = write_colours(tmp_path / "colours")
    said, work_dir = zoo_train("test_resnet", data, "--epochs", 3, "--batch", 4, "--lr", 0.01)
    assert re.search(r"colours: class folders, 2\d for train, \d+ for val", said) and re.search(r"\bgreen +\d+ +\d+", said)
    assert "fold 0 of 5" in said and "pictures of 32×32 pixels are seen at 32×32, also mirrored" in said
    assert Image.open(work_dir / "samples.png").size > (300, 300)
    best, = work_dir.glob("best_*.pth")
    accuracy = evaluate(work_dir / "config.py", best)["accuracy/top1"]
    assert accuracy > 60
    model, info = load_trained(best)
    assert info.classes == ("blue", "green", "red") and info.input_size == (3, 32, 32)
    assert predict(model, info, [data / "red" / "0.png"])[0].classes[0][0] in info.classes

    train(work_dir / "config.py", work_dir=work_dir, resume="auto", cfg_options=["train_cfg.max_epochs=4"])
    assert latest_checkpoint(work_dir).name == "epoch_4.pth"


def test_weights_start_a_training_and_only_the_head_learns(zoo_train, tmp_path):
    data = write_colours(tmp_path / "colours")
    source = timm.create_model("test_resnet", num_classes=7)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "start.pth")
    said, work_dir = zoo_train("test_resnet", data, "--weights", tmp_path / "start.pth", "--freeze", "--epochs", 1, "--size", 32)
    assert f"from {tmp_path / 'start.pth'}" in said
    trained, _ = load_trained(latest_checkpoint(work_dir))
    before, heads = source.state_dict(), 0
    for name, value in trained.state_dict().items():
        if value.shape != before[name].shape:
            heads += 1
        else:
            assert torch.equal(value, before[name]), name  # running statistics, too
    assert heads == 2
    (tmp_path / "start.pth").unlink()  # what evaluates and resumes does not need it
    best, = work_dir.glob("best_*.pth")
    evaluate(work_dir / "config.py", best)
    train(work_dir / "config.py", work_dir=work_dir, resume="auto", cfg_options=["train_cfg.max_epochs=2"])


def test_what_was_pruned_is_trained_on(zoo_train, tmp_path):
    """Heads stay away, and attention with a share fades out."""
    data = write_colours(tmp_path / "colours")
    _, first = zoo_train("test_vit", data, "--epochs", 1, "--size", 32)
    pruned = tmp_path / "pruned.pth"
    prune.main([str(latest_checkpoint(first)), str(data), "--heads", "0.4", "-o", str(pruned)])
    prune.main([str(pruned), str(data), "--attention", "1", "-o", str(pruned)])
    said, work_dir = zoo_train("test_vit", data, "--epochs", 2, "--size", 32, "--weights", pruned, work_dir="second")
    started, info = load_trained(pruned)
    blocks = info.changes[1]["blocks"]
    assert f"the network is changed as that of {pruned}: prune_heads, remove_attention" in said
    assert f"attention fades out of blocks {blocks[0]}; the best is of the epochs after that" in said
    ended, info = load_trained(next(work_dir.glob("best_*.pth")))
    assert [change["type"] for change in info.changes] == ["prune_heads", "remove_attention", "remove_attention"]
    for place, (before, after) in enumerate(zip(started.blocks, ended.blocks, strict=True)):
        assert place in blocks or after.attn.num_heads == before.attn.num_heads
    again, _ = zoo_train("test_vit", data, "--epochs", 1, "--size", 32, "--weights", latest_checkpoint(work_dir), work_dir="third")
    assert "fades" not in again  # what is gone does not come back


def write_stripes(folder: Path, mask_folder: Path, count: int = 8, side: int = 32) -> None:
    """Pictures of a bright stripe, and masks of it, 0 and 255."""
    for i in range(count):
        labels = np.zeros((side, side), np.uint8)
        labels[:, 3 * i % 24:3 * i % 24 + 8] = 1
        for path, pixels in ((folder / f"{i}.png", 60 + 120 * labels), (mask_folder / f"{i}_mask.png", 255 * labels)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("model", ["attention_unet_nano", "test_resnet"])
def test_pictures_and_masks_train(zoo_train, tmp_path, model):
    write_stripes(tmp_path / "data/images", tmp_path / "data/masks")
    said, work_dir = zoo_train(model, tmp_path / "data", "--epochs", 2, "--batch", 2)
    assert "pictures and masks, 6 for train, 2 for val" in said
    assert "of pictures of 32×32 pixels windows of 32×32 are seen" in said and "255 is object" in said
    best, = work_dir.glob("best_iou_mean_*.pth")
    assert load_trained(best)[1].classes == ("background", "object")
    with pytest.raises(SystemExit) as end:
        command(["predict", str(best), str(tmp_path / "data/images"), "-o", str(tmp_path / "answers")])
    assert not end.value.code and len(list((tmp_path / "answers").glob("0*"))) >= 1
    assert set(evaluate(work_dir / "config.py", best)) == {"iou/background", "iou/object", "iou/mean"}


def test_the_encoder_of_a_unet_starts_from_a_classifiers_weights(zoo_train, tmp_path):
    write_stripes(tmp_path / "data/images", tmp_path / "data/masks")
    source = timm.create_model("biformer_nano", num_classes=4)
    torch.save({"state_dict": {f"model.{name}": value for name, value in source.state_dict().items()}}, tmp_path / "start.pth")
    _, work_dir = zoo_train("biformer_nano", tmp_path / "data", "--weights", tmp_path / "start.pth", "--freeze", "--epochs", 1)
    trained, _ = load_trained(latest_checkpoint(work_dir))
    stem = source.stem.conv1.weight
    assert any(value.shape == stem.shape and torch.equal(value, stem) for value in trained.encoder.state_dict().values())


def write_balls(root: Path, count: int = 6, side: int = 16) -> None:
    """A task of the Decathlon's form, of volumes with a bright cube."""
    named = []
    for i in range(count):
        labels = np.zeros([side] * 3, np.uint8)
        labels[4:10, i:i + 6, 3:9] = 1
        pair = [f"./{folder}/{i}.nii.gz" for folder in ("imagesTr", "labelsTr")]
        for name, voxels in zip(pair, (100.0 + 50 * labels, labels), strict=True):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), np.diag([1, 1, 2 + i % 2, 1])), root / name)
        named.append({"image": pair[0], "label": pair[1]})
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "cube"}, "training": named}))


def test_volumes_train(zoo_train, tmp_path):
    write_balls(tmp_path / "Task01")
    said, work_dir = zoo_train("attention_unet3d_nano", tmp_path / "Task01", "--epochs", 1, "--folds", 3, "--fold", 1)
    assert "4 for train, 2 for val" in said and "intensities: mean 0 and variance 1" in said
    spacing, = re.findall(r"spacing: 1.0×1.0×(2.0|2.5|3.0) mm", said)  # by which of the volumes are for training
    best, = work_dir.glob("best_dice_mean_*.pth")
    model, info = load_trained(best)
    assert info.classes == ("background", "cube") and info.data_config["spacing"] == (1.0, 1.0, float(spacing))


def test_tables_train(zoo_train, tmp_path):
    data = write_colours(tmp_path / "colours", count=6)
    names = {"blue": "'b', \\n", "green": 'g "ü"', "red": "2"}
    with (tmp_path / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["picture", "colour", "part"])
        rows.writerows([path.relative_to(tmp_path), names[path.parent.name], "val" if path.stem == "0" else "train"]
                       for path in sorted(data.rglob("*.png")))
    said, work_dir = zoo_train("test_resnet", tmp_path / "table.csv", "--epochs", 1)
    assert "a table of files and classes, 15 for train, 3 for val" in said
    assert load_trained(latest_checkpoint(work_dir))[1].classes == ("2", "'b', \\n", 'g "ü"')


@pytest.mark.parametrize(("names", "expected"), [
    (("cat", "dog"), True), (("0", "1"), False), (("a", "B"), False), (("left lung", "heart"), False), (("hand_R", "foot_R"), False),
    (("bright", "lefty"), True), (("background", "class 1"), False), (("background", "object"), True),
    (("Traffic light", "right-turn"), False),
])
def test_what_is_mirrored(names, expected):
    assert mirrors(names) == expected


@pytest.mark.parametrize("outlined", [True, False])
def test_boxes_train(zoo_train, tmp_path, outlined):
    pytest.importorskip("mmdet")
    write_digit_scenes(tmp_path / "scenes", train=8, val=3, size=64)
    if not outlined:
        for path in (tmp_path / "scenes/annotations").glob("*.json"):
            described = json.loads(path.read_text())
            for box in described["annotations"]:
                del box["segmentation"], box["area"]
            path.write_text(json.dumps(described))
    said, work_dir = zoo_train("biformer_nano", tmp_path / "scenes", "--epochs", 1, "--batch", 2)
    assert f"COCO's boxes {'and' if outlined else 'without'} masks, 8 for train, 3 for val" in said and "never mirrored" in said
    assert f"{'Mask' if outlined else 'Faster'} R-CNN around biformer_nano; pictures of 64×64 pixels are seen at 64" in said
    metrics = evaluate(work_dir / "config.py", latest_checkpoint(work_dir))
    assert ("coco/segm_mAP" in metrics) == outlined and "coco/bbox_mAP" in metrics
    model, info = load_scene_model(latest_checkpoint(work_dir))
    described = json.loads((work_dir / "train.json").read_text())
    assert info.classes == tuple(entry["name"] for entry in described["categories"])
    most = max(Counter(box["image_id"] for box in described["annotations"]).values())
    assert load_config(work_dir / "config.py").model.train_cfg.rpn_proposal.max_per_img == max(50, 16 * most)
    train(work_dir / "config.py", work_dir=work_dir, resume="auto", cfg_options=["train_cfg.max_epochs=2"])


def test_what_does_not_fit_is_refused(zoo_refuses, tmp_path):
    colours = write_colours(tmp_path / "colours", count=4)
    write_stripes(tmp_path / "stripes/images", tmp_path / "stripes/masks")
    write_balls(tmp_path / "Task01")
    for arguments, message in [
        (("biformer_nan", colours), "there is no model biformer_nan; did you mean biformer_nano"),
        (("inspyrenet_nano", colours), "inspyrenet_nano is a network that cuts out objects, and .*, which need a classifier"),
        (("attention_unet_nano", colours), "is a U-Net for pictures and masks, and .*colours holds class folders, which need a classifier"),
        (("attention_unet3d_nano", tmp_path / "stripes"), "is a U-Net for volumes and masks, and .* which need a U-Net in 2-D"),
        (("test_vit", tmp_path / "stripes"), "encoder test_vit is not hierarchical"),
        (("resnet18", tmp_path / "Task01"), "is a network for pictures, and .* which need a U-Net in 3-D, such as attention_unet3d_nano"),
        (("test_resnet", tmp_path / "nowhere"), "there is no data .*nowhere"),
        (("test_resnet", colours, "--epochs", 0), "--epochs 0: it is above 0"),
        (("test_resnet", colours, "--batch", 100), "--batch 100: .*colours has 9 samples to train on"),
        (("test_resnet", colours, "--folds", 20), "12 different samples cannot be divided into 20 folds"),
        (("test_resnet", colours, "--freeze"), "goes with --weights or --pretrained"),
        (("test_resnet", colours, "--weights", "nowhere.pth"), "there is no file nowhere.pth"),
        (("test_resnet", colours, "--weights", colours / "red/0.png"), "0.png is damaged or no checkpoint at all"),
        (("biformer_nano", colours, "--pretrained"), "there are no weights of biformer_nano to download; --weights takes a file"),
        (("biformer_nano",), "is a model, and no config is called so; .* zoo train biformer_nano DATA; did you mean biformer_nano_digits"),
        ((colours, "test_resnet"), "is a folder, and the model comes first: zoo train test_resnet .*colours"),
        (("my_config.py", colours), "my_config.py is a config, which names its data itself"),
        (("biformer_nano_digits", "--epochs", 3), r"--epochs goes with a model and data \(zoo train biformer_nano DATA\)"),
    ]:
        assert re.search(message, zoo_refuses(*arguments)), message


def test_a_run_is_not_written_over(zoo_train, capfd, tmp_path):
    data = write_colours(tmp_path / "colours", count=4)
    _, work_dir = zoo_train("test_resnet", data, "--epochs", 1)
    before = {path: path.stat().st_mtime_ns for path in work_dir.rglob("*")}
    with pytest.raises(SystemExit) as end:
        command(["train", "test_resnet", str(data), "--work-dir", str(work_dir)])
    assert end.value.code == 2 and f"zoo train {work_dir / 'config.py'} --resume" in capfd.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in work_dir.rglob("*")}
