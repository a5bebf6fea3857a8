"""A network knows classes by their order: names are compared wherever two lists of them meet."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import TINY

from zoo.checkpoints import read
from zoo.errors import InputError
from zoo.mm import evaluate, train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.reading.class_names import check_same_classes

DIGITS = "biformer_nano_digits"


def folders(root: Path, **classes: tuple[str, ...]) -> None:
    """Four pictures of every class in root/SPLIT/CLASS."""
    for split, names in classes.items():
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((32, 32), 40 * number + i, np.uint8)).save(root / split / name / f"{i}.png")


def options(root: Path, classes: int, *more: str) -> list[str]:
    transform = "'transform': {'input_size': 32}"
    data = [f"{part}_dataloader.dataset={{'type': 'ImageFolderDataset', 'root': {str(root)!r}, 'split': {split!r}, {transform}}}"
            for part, split in (("train", "train"), ("val", "val"), ("test", "val"))]
    return [*(option for option in TINY if "limit" not in option and "model.args" not in option), *data, "train_cfg.max_epochs=1",
            "train_cfg.val_interval=1", "train_dataloader.batch_size=4", f"model.args={{'num_classes': {classes}, 'img_size': 32}}",
            f"experiment_name={root.parent.name}-{root.name}-{len(more)}", *more]


@pytest.fixture
def pets(tmp_path) -> Path:
    folders(tmp_path / "pets", train=("cat", "dog"), val=("cat", "dog"))
    return tmp_path / "pets"


def test_lists_are_compared_with_their_order():
    check_same_classes(["a", 1], "x", ("a", "1"), "y")
    for given, known, message in [
        (["b", "a"], ["a", "b"], "x and y have the same classes in another order: number 0 is 'b' there and 'a' here"),
        (["a", "cat"], ["a", "cats"], "x and y do not have the same classes, 2 and 2: only x has 'cat' and only y has 'cats'; did"),
        (["a"], ["a", "b", "c", "d", "e", "f"], r"1 and 6: only y has 'b', 'c', 'd', 'e' and 1 more"),
        (["a", "a"], ["a"], "2 and 1: one of them repeats some"),
    ]:
        with pytest.raises(InputError, match=message):
            check_same_classes(given, "x", known, "y")


def test_training_and_validation_have_the_same_classes(tmp_path):
    folders(tmp_path / "data", train=("cat", "dog"), val=("cat", "fox"))
    with pytest.raises(InputError, match="the val data and the train data do not have the same classes, .* only the val data have 'fox'"):
        train(DIGITS, work_dir=tmp_path / "run", cfg_options=options(tmp_path / "data", 2))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_tested_resumed_and_fine_tuned_on_its_own_classes(pets, tmp_path, caplog):
    train(DIGITS, work_dir=tmp_path / "first", cfg_options=options(pets, 2))
    checkpoint = latest_checkpoint(tmp_path / "first")
    assert read(checkpoint)["zoo"]["classes"] == ["cat", "dog"]
    evaluate(DIGITS, checkpoint, cfg_options=options(pets, 2))
    folders(tmp_path / "others", train=("cow", "dog"), val=("cow", "dog"))
    with pytest.raises(InputError, match="the data and the checkpoint .* do not have the same classes, 2 and 2: only the data have 'cow'"):
        evaluate(DIGITS, checkpoint, cfg_options=options(tmp_path / "others", 2))
    with pytest.raises(InputError, match="the data and the checkpoint .* do not have the same classes"):
        train(DIGITS, work_dir=tmp_path / "resumed", resume=checkpoint, cfg_options=options(tmp_path / "others", 2))

    def tuned(root: Path, name: str) -> dict:
        train(DIGITS, work_dir=tmp_path / name, cfg_options=options(
            root, 2, f"load_from={checkpoint}", "optim_wrapper.optimizer.lr=0.0", "optim_wrapper.optimizer.weight_decay=0.0"))
        return read(latest_checkpoint(tmp_path / name))["state_dict"]

    before = read(checkpoint)["state_dict"]
    same = tuned(pets, "same")
    assert all(torch.equal(before[name], same[name]) for name in before)
    other = tuned(tmp_path / "others", "other")
    assert {name for name in before if not torch.equal(before[name], other[name])} == {"model.head.weight", "model.head.bias"}
    assert "knows other classes than the data, 'cat', 'dog': 2 weights that tell classes apart begin anew" in "".join(
        path.read_text() for path in (tmp_path / "other").rglob("*.log"))


def test_files_of_weights_are_needed_to_begin_and_not_to_test_or_go_on(pets, tmp_path):
    weights = tmp_path / "gone.safetensors"
    begin = options(pets, 2, f"model.args.checkpoint_path={weights}")
    with pytest.raises(InputError, match="model test_vit starts from a file of weights that is not there: .*gone.safetensors"):
        train(DIGITS, work_dir=tmp_path / "run", cfg_options=begin)
    train(DIGITS, work_dir=tmp_path / "run", cfg_options=options(pets, 2))
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert evaluate(DIGITS, checkpoint, cfg_options=begin)
    train(DIGITS, work_dir=tmp_path / "run", resume=checkpoint, cfg_options=[*begin, "train_cfg.max_epochs=2"])


def test_a_checkpoint_of_another_model_is_named_in_a_line(pets, tmp_path):
    train(DIGITS, work_dir=tmp_path / "run", cfg_options=options(pets, 2))
    with pytest.raises(InputError) as refused:
        evaluate(DIGITS, latest_checkpoint(tmp_path / "run"), cfg_options=options(
            pets, 2, "model.name=test_resnet", "model.args={'num_classes': 2}"))
    said = str(refused.value)
    assert "are of another model: " in said and " missing (" in said and len(said) < 700
    assert said.endswith("; it is a checkpoint for classification of test_vit with 2 classes")
