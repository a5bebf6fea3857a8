import argparse
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from zoo import checkpoints
from zoo.errors import InputError
from zoo.unpickling import Ignored


class CreatesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@dataclasses.dataclass
class Harmless:
    number: int


def record(**changes) -> dict:
    return {"task": "classification", "model": "test_resnet", "model_args": {"in_chans": 1}, "classes": ["a", "b"],
            "input_size": (1, 32, 48), "mean": [0.1], "std": [0.2], "interpolation": "nearest", "crop_pct": 0.5,
            "crop_mode": "squash", **changes}


@pytest.fixture(scope="module")
def weights() -> dict:
    return timm.create_model("test_resnet", num_classes=2, in_chans=1).state_dict()


def trained(weights: dict, **changes) -> dict:
    return {"zoo": record(**changes), "state_dict": {f"model.{key}": value for key, value in weights.items()}}


def test_reads_tensors_and_containers(tmp_path):
    saved = {"a": torch.arange(3), "b": [1, "two", None]}
    torch.save(saved, tmp_path / "x.pth")
    found = checkpoints.read(tmp_path / "x.pth")
    assert found["b"] == saved["b"]
    assert found["a"].equal(saved["a"])


def test_reads_safetensors(tmp_path):
    safetensors.torch.save_file({"a": torch.arange(3)}, tmp_path / "x.safetensors")
    assert checkpoints.read(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("zipped", [True, False])
def test_refuses_code_and_does_not_run_it(tmp_path, zipped):
    created = tmp_path / "created"
    torch.save({"a": CreatesFile(created)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"x.pth would run code on loading and is refused: it names posix.mkdir"):
        checkpoints.read(tmp_path / "x.pth")
    assert not created.exists()


def test_reads_what_is_allowed_and_nothing_else(tmp_path):
    torch.save([Harmless(3)], tmp_path / "x.pth")
    assert checkpoints.read(tmp_path / "x.pth", allow=[Harmless]) == [Harmless(3)]
    with pytest.raises(InputError, match="Harmless"):
        checkpoints.read(tmp_path / "x.pth", allow=[argparse.Namespace])
    assert isinstance(checkpoints.read(tmp_path / "x.pth")[0], Ignored)


@pytest.mark.parametrize("kept", [0, 1, 10, 1000, -10])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_files_are_one_sentence(tmp_path, name, kept):
    path = tmp_path / name
    tensors = {str(i): torch.randn(100) for i in range(3)}
    safetensors.torch.save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{name} is (empty|damaged)"):
        checkpoints.read(path)


def test_bytes_of_something_else(tmp_path):
    path = tmp_path / "x.pth"
    path.write_text("These are not the weights you are looking for.")
    with pytest.raises(InputError, match=r"x.pth is damaged or no checkpoint at all"):
        checkpoints.read(path)


def test_missing_files_name_near_misses(tmp_path):
    (tmp_path / "epoch_12.pth").touch()
    with pytest.raises(InputError, match=r"no checkpoint .*epoch_21.pth; did you mean epoch_12.pth"):
        checkpoints.read(tmp_path / "epoch_21.pth")
    with pytest.raises(InputError, match=r"is a folder; .* for example epoch_12.pth"):
        checkpoints.read(tmp_path)
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoints.read(tmp_path / "nowhere" / "x.pth")


def test_model_by_name():
    model, info = checkpoints.load_model("test_resnet", num_classes=5)
    assert not model.training
    assert model.num_classes == 5
    assert info == checkpoints.ModelInfo("test_resnet", (), timm.data.resolve_model_data_config(model))


def test_grey_model_by_name_has_a_data_config_of_one_channel():
    _, info = checkpoints.load_model("test_resnet", in_chans=1)
    assert info.input_size[0] == len(info.data_config["mean"]) == len(info.data_config["std"]) == 1


def test_unknown_model_names_near_misses():
    with pytest.raises(InputError, match=r"neither a model nor a file called 'resnet_18'; did you mean .*resnet18"):
        checkpoints.load_model("resnet_18")


def test_model_of_training(tmp_path, weights):
    torch.save(trained(weights), tmp_path / "x.pth")
    model, info = checkpoints.load_model(tmp_path / "x.pth")
    assert not model.training
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items())
    assert (info.name, info.classes, info.input_size) == ("test_resnet", ("a", "b"), (1, 32, 48))
    expected = {"mean": (0.1,), "std": (0.2,), "interpolation": "nearest", "crop_pct": 0.5, "crop_mode": "squash"}
    assert {key: info.data_config[key] for key in expected} == expected


def test_record_without_preprocessing_falls_back_to_the_models_own(tmp_path, weights):
    bare = {"task": "classification", "model": "test_resnet", "model_args": {"in_chans": 1}, "classes": ["a", "b"]}
    torch.save({"zoo": bare, "state_dict": trained(weights)["state_dict"]}, tmp_path / "x.pth")
    _, info = checkpoints.load_trained(tmp_path / "x.pth")
    assert info.input_size[1:] == timm.get_pretrained_cfg("test_resnet").input_size[1:]


def test_records_of_the_engine_are_read_as_nothing_and_without_it(tmp_path, weights):
    """The subprocess cannot import mmengine, as on a machine that only predicts."""
    logging = pytest.importorskip("mmengine.logging")
    log = logging.HistoryBuffer()
    log.update(0.5)
    hub = {"log_scalars": {"loss": log}, "runtime_info": {"lr": np.float64(0.1), "n": np.int64(3), "x": np.arange(2)}}
    path = tmp_path / "x.pth"
    torch.save(trained(weights) | {"message_hub": hub}, path)
    assert isinstance(checkpoints.read(path)["message_hub"]["log_scalars"]["loss"], Ignored)
    script = ("import sys; sys.modules['mmengine'] = None\n"
              f"from zoo.checkpoints import load_model; print(load_model({str(path)!r})[1].classes)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "('a', 'b')", done.stderr


def test_stand_ins_hide_no_code(tmp_path, weights):
    created = tmp_path / "created"
    torch.save(trained(weights) | {"message_hub": CreatesFile(created)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="would run code"):
        checkpoints.load_model(tmp_path / "x.pth")
    assert not created.exists()


def test_foreign_checkpoints_are_one_sentence(tmp_path, weights):
    path = tmp_path / "x.pth"
    torch.save(weights, path)
    with pytest.raises(InputError, match=r"not a checkpoint of `zoo train`: it holds conv1.0.weight, .* 'zoo' and 'state_dict'"):
        checkpoints.load_model(path)
    torch.save([1], path)
    with pytest.raises(InputError, match="it holds list"):
        checkpoints.load_model(path)
    torch.save(trained(weights, task="detection"), path)
    with pytest.raises(InputError, match="for 'detection', not for 'classification' or 'segmentation'"):
        checkpoints.load_model(path)
    torch.save(trained(weights, model="test_resnte"), path)
    with pytest.raises(InputError, match="'test_resnte' that is not registered here; did you mean test_resnet"):
        checkpoints.load_model(path)
    torch.save(trained(weights, model_args={"depht": 3}), path)
    with pytest.raises(InputError, match="arguments that test_resnet does not take: .*depht"):
        checkpoints.load_model(path)
    for task, kind in [("mmseg", "segmentor of mmsegmentation"), ("mmdet", "detector of mmdetection")]:
        torch.save({"zoo": {"task": task, "model": {"type": "X"}}, "state_dict": {}}, path)
        with pytest.raises(InputError, match=f"x.pth holds a {kind}, which `zoo predict` and `zoo export` take and this does"):
            checkpoints.load_model(path)


@pytest.mark.parametrize(("field", "value", "needed"), [
    ("model", 3, "a model's name is"), ("model", None, "a model's name is"), ("model", ["test_resnet"], "a model's name is"),
    ("classes", 5, "a list of names is"), ("classes", "ab", "a list of names is"), ("classes", [["a"], ["b"]], "a list of names is"),
    ("model_args", [1, 2], "a dict of arguments by name is"), ("model_args", {1: 2}, "a dict of arguments by name is"),
    *(("input_size", value, "a list of 3 or 4 whole numbers above 0 is") for value in ("abc", (1,), (1, 0, 0), (1, 8.5, 8))),
    ("mean", ["a"], "a list of numbers is"), ("mean", [], "a list of numbers is"), ("mean", [float("nan")], "a list of numbers is"),
    ("std", [0.0], "a list of numbers above 0 is"), ("std", 1, "a list of numbers above 0 is"),
    ("interpolation", "foo", "one of nearest, bilinear, .* is"), ("interpolation", ["nearest"], "one of nearest, bilinear, .* is"),
    ("crop_mode", "wide", "one of center, squash, border is"),
    ("crop_pct", "a", "a number from 0.01 to 1 is"), ("crop_pct", 0.0, "a number from 0.01 to 1 is"),
    ("spacing", (1, 1), "3 numbers above 0 is"), ("clip", (40, 40), "a number and a greater one is"),
])
def test_damaged_records_are_one_sentence(tmp_path, weights, field, value, needed):
    torch.save(trained(weights, **{field: value}), tmp_path / "x.pth")
    with pytest.raises(InputError, match=rf"x.pth (records {field}=|does not record '{field}').*, where {needed} needed$"):
        checkpoints.load_model(tmp_path / "x.pth")


@pytest.mark.parametrize("changes", [
    {"model_args": {"in_chans": -1}}, {"model_args": {"in_chans": "one"}}, {"model_args": {"num_classes": [2]}}, {"model": "test_resnet.x"},
    {"model": "attention_unet", "model_args": {"encoder": "nothing"}},
], ids=str)
def test_arguments_that_no_model_can_be_made_of_are_one_sentence(tmp_path, weights, changes):
    torch.save(trained(weights, **changes), tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth records arguments that \S+ does not take: .+"):
        checkpoints.load_model(tmp_path / "x.pth")


def test_sizes_of_other_dimensions_than_the_models_are_one_sentence(tmp_path, weights):
    torch.save(trained(weights, input_size=(1, 32, 32, 32)), tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"records input_size=\(1, 32, 32, 32\), and test_resnet takes channels and 2 sizes"):
        checkpoints.load_model(tmp_path / "x.pth")


@pytest.mark.parametrize("nested", [False, True])
def test_recorded_arguments_open_no_other_file_and_download_nothing(tmp_path, weights, monkeypatch, nested):
    """Training may have started from them; the weights that are loaded are the checkpoint's."""
    def refuse(*args, **kwargs):
        raise AssertionError("weights from elsewhere")

    for name in ("load_pretrained", "load_state_dict", "load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(timm.models._builder, name, refuse)
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", refuse)
    sources = {"pretrained": True, "pretrained_cfg": {"file": "a.pth"}, "pretrained_cfg_overlay": {"file": "a.pth"}, "cache_dir": "a"}
    if nested:
        args = {"encoder": "test_resnet", "norm": "group"}
        state = timm.create_model("attention_unet", num_classes=2, in_chans=1, **args).state_dict()
        record = {"model": "attention_unet", "task": "segmentation", "model_args": {"in_chans": 1, **args, "encoder_args": sources}}
    else:
        state, record = weights, {"model_args": {"in_chans": 1, "checkpoint_path": "a.pth", **sources}}
    torch.save(trained(state, **record), tmp_path / "x.pth")
    model, _ = checkpoints.load_model(tmp_path / "x.pth")
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())


def test_weights_that_do_not_fit_are_named(tmp_path, weights):
    saved = trained(weights)
    state = saved["state_dict"]
    del state["model.fc.bias"]
    state["model.fc.weight"] = state["model.fc.weight"][:1]
    state["model.other.weight"] = torch.zeros(1)
    torch.save(saved, tmp_path / "x.pth")
    with pytest.raises(InputError) as raised:
        checkpoints.load_model(tmp_path / "x.pth")
    message = str(raised.value)
    assert "do not fit test_resnet" in message
    assert "1 missing (fc.bias)" in message
    assert "1 unexpected (other.weight)" in message
    assert "fc.weight (1, 96) where (2, 96) is needed" in message


def test_importing_zoo_checkpoints_does_not_import_the_engine_or_onnx():
    script = "import sys, zoo.checkpoints; print(sorted({'mmengine', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_classes_without_as_many_outputs_are_refused(tmp_path, weights):
    torch.save(trained(weights, model_args={"in_chans": 1, "num_classes": 3}), tmp_path / "x.pth")
    with pytest.raises(InputError, match="x.pth records 2 classes and a network of 3, so that nothing says which is which"):
        checkpoints.load_trained(tmp_path / "x.pth")
