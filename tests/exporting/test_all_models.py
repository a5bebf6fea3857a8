"""Many models exported into one table, and what other software makes of the files."""
import dataclasses
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

from zoo.checkpoints import ModelInfo, load_model
from zoo.errors import InputError
from zoo.exporting import all_models as exports
from zoo.exporting import precision as quantize
from zoo.exporting.all_models import RECORDS, TABLE, export_all, read_records
from zoo.exporting.onnx import Exported, export_onnx

CLASSES = ("dark", "light")
SHALLOW = {  # every kind of block once: the exporter takes time for every operator
    "attnet_nano": dict(depths=(1, 0, 0, 1)), "biformer_nano": dict(depths=(1, 0, 0, 1)), "das_resnet_nano": {},
    "polarized_resnet_nano": dict(layers=(1, 1, 1, 1)), "sknet_nano": dict(layers=(1, 1, 1, 1)),
}


def run(path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, {"image": images})[0]


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return folder, export_all(["test_resnet"], folder, rounds=1)["test_resnet"]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A trained-looking model of two classes, and its file: one class for dark, one for light pictures."""
    torch.manual_seed(0)
    model, info = load_model("test_resnet", num_classes=2)
    info = ModelInfo("test_resnet", CLASSES, {**info.data_config, "input_size": (3, 64, 64)})
    path = tmp_path_factory.mktemp("resnet") / "resnet.onnx"
    export_onnx(model, info, path, size=(64, 64), free_size=False)
    return path, info


@pytest.fixture
def pictures(tmp_path):
    for label, grey in zip(CLASSES, (60, 200), strict=True):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(4):
            pixels = (images(64, 64, 3) * 20 + grey + 5 * i).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.long
@pytest.mark.parametrize(("name", "args"), SHALLOW.items(), ids=SHALLOW)
def test_a_model_is_exported_without_own_operators_and_openvino_agrees(name, args, tmp_path):
    """With free batch, height and width, also where the last map is one position, which tracing at that size would make a constant.

    On one size besides those that the export has compared. OpenVINO has no DeformConv.
    """
    model, info = load_model(name, in_chans=1, num_classes=10, **args)
    path = tmp_path / "x.onnx"
    result = export_onnx(model, info, path, size=(32, 32), spell_out=True)
    assert result.free_batch and result.free_size, result.reason
    assert {entry.domain for entry in onnx.load(path).opset_import} == {""}
    x = images(2, 1, 70, 97)
    expected = run(path, x)
    found = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


def test_a_record_says_what_the_file_holds(exported):
    folder, record = exported
    graph = onnx.load(folder / "test_resnet.onnx")
    assert record.bytes == (folder / "test_resnet.onnx").stat().st_size
    assert record.opset == graph.opset_import[0].version == 20
    assert sum(record.operators.values()) == len(graph.graph.node)
    assert (record.failure, record.reason, record.same_top1) == ("", "", exports.PICTURES)
    assert 0 <= record.difference < 1e-4 and min(record.seconds) > 0
    assert read_records(folder / RECORDS).keys() == {"test_resnet"}
    rows = (folder / TABLE).read_text().splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == ["test_resnet"]
    assert len({row.count("|") for row in rows}) == 1


def test_what_is_done_is_kept_and_what_is_not_is_done(exported, tmp_path, monkeypatch):
    source, record = exported
    folder = shutil.copytree(source, tmp_path / "exports")
    steps, made = [], []
    monkeypatch.setattr(exports, "_export", lambda name, *_: made.append(name) or record)
    again = export_all(["test_resnet", "test_vit"], folder, progress=steps.append)
    assert made == ["test_vit"]
    assert steps[0] == "1/2 test_resnet: is there already"
    assert again["test_resnet"] == dataclasses.replace(record, seconds=again["test_resnet"].seconds)
    export_all(["test_resnet"], folder, opset=21)
    export_all(["test_resnet"], folder, spell_out=True)
    assert made == ["test_vit", "test_resnet", "test_resnet"]
    (folder / "test_resnet.onnx").write_bytes(b"damaged")
    export_all(["test_resnet"], folder)
    assert made == ["test_vit", "test_resnet", "test_resnet", "test_resnet"]


def test_processes_export_side_by_side_and_times_are_taken_after(tmp_path, capfd):
    records = export_all(["test_resnet", "test_vit"], tmp_path, rounds=1, jobs=2, progress=print)
    assert not any(record.failure for record in records.values())
    assert all(min(record.seconds) > 0 for record in records.values())
    steps = capfd.readouterr().out.splitlines()
    assert {step.split(":")[0] for step in steps} == {"1/2 test_resnet", "2/2 test_vit"}
    assert steps[-2:] == ["1/2 test_resnet: timing", "2/2 test_vit: timing"]
    with pytest.raises(InputError, match="jobs is 0; it has to be at least 1"):
        export_all(["test_resnet"], tmp_path, jobs=0)


def test_times_are_taken_where_a_run_was_stopped_before_them(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "exports")
    untimed = {"test_resnet": dataclasses.replace(exported[1], seconds=())}
    exports._write(folder, untimed)
    assert "|  |  |" in (folder / TABLE).read_text()
    assert min(export_all(["test_resnet"], folder, rounds=1)["test_resnet"].seconds) > 0


def test_a_failure_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    def refuse(model, info, path, **_):
        path.write_bytes(b"half")
        raise exports.ExportError("it cannot be")

    monkeypatch.setattr(exports, "export_onnx", refuse)
    records = export_all(["test_resnet", "test_vit"], tmp_path)
    assert {record.failure for record in records.values()} == {"it cannot be"}
    assert (tmp_path / TABLE).read_text().count("failed: it cannot be") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORDS, TABLE]


def test_another_class_is_a_failure(exported, tmp_path, monkeypatch):
    def copied(model, info, path, **_):
        return Exported(shutil.copy(exported[0] / "test_resnet.onnx", path), True, True, "", ())

    monkeypatch.setattr(exports, "export_onnx", copied)
    monkeypatch.setattr(exports, "_same_top1", lambda *_: 63)
    record = export_all(["test_resnet"], tmp_path, rounds=1)["test_resnet"]
    assert record.failure == "ONNX Runtime and PyTorch name the same class for 63 of 64 images only"
    assert not (tmp_path / "test_resnet.onnx").exists()


def test_same_classes_are_counted():
    model = lambda x: x.mean((2, 3))  # noqa: E731
    x = torch.eye(16)[:, :, None, None]
    assert exports._same_top1(model, model, x) == 16
    assert exports._same_top1(model, lambda x: model(x).roll(1, 1), x) == 0

    def segments(x):
        return x.expand(-1, -1, 3, 2)

    assert exports._same_top1(segments, segments, x) == 16
    assert exports._same_top1(segments, lambda x: segments(x).roll(1, 1), x) == 0


def test_volumes_are_varied_too():
    x = exports._varied_images(ModelInfo("x", (), {"input_size": (2, 1, 1, 1)}, "segmentation"), 5, (6, 8, 7))
    assert x.shape == (5, 2, 6, 8, 7) and x.std((2, 3, 4)).min() > 0.1


def test_records_that_are_none_are_one_sentence(tmp_path):
    for text in ("{", '{"a": {"unknown": 1}}', "[1]"):
        (tmp_path / RECORDS).write_text(text)
        with pytest.raises(InputError, match="does not hold records of exports; remove it"):
            export_all(["test_resnet"], tmp_path)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_lower_precision(resnet, pictures, tmp_path, precision):
    source, info = resnet
    path = tmp_path / "x" / "x.onnx"
    path.parent.mkdir()
    path.write_bytes(source.read_bytes())
    change = quantize.lower_precision(path, precision, info, pictures)
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_size < (0.6 if precision == "float16" else 0.5) * source.stat().st_size
    measured = sorted(pictures.rglob("*.png"))[1::2]
    inputs = list(quantize._images(info, measured))
    found, expected = (np.concatenate([run(file, image) for image in inputs]) for file in (path, source))
    assert 0 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    metadata = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    labels = [CLASSES.index(picture.parent.name) for picture in measured]
    assert change.before == 100 * np.mean(expected.argmax(1) == labels)
    assert change.after == 100 * np.mean(found.argmax(1) == labels)
    assert (change.pictures, change.same) == (4, (found.argmax(1) == expected.argmax(1)).sum())


def test_unlabelled_pictures_measure_agreement_only(resnet, pictures, tmp_path):
    source, info = resnet
    found = quantize.find_pictures([pictures])
    assert quantize._compare(source, source, dataclasses.replace(info, classes=("a", "b")), found) == quantize.Change(0.0, 8, 8)
    some = quantize._compare(source, source, dataclasses.replace(info, classes=(CLASSES[0], "b")), found)
    assert some.labelled == 4 and some.before == some.after is not None


@pytest.mark.parametrize("name", ["biformer_nano", "attention_unet_nano"])
def test_float16_runs_where_nodes_in_float32_share_an_input(tmp_path, name):
    model, info = load_model(name, **({"widths": (4, 6, 8)} if "unet" in name else SHALLOW[name]))
    path = export_onnx(model, info, tmp_path / "x.onnx", size=(48, 64), free_size=False).path
    expected = run(path, image := torch.randn(1, 3, 48, 64).numpy())
    change = quantize.lower_precision(path, "float16", info, None)
    assert 0 < change.difference < 0.05 and change.pictures == 0
    assert np.abs(run(path, image) - expected).max() < 0.05 * expected.std()


def test_pictures_that_do_not_suffice(pictures, tmp_path):
    with pytest.raises(InputError, match="pictures calibrate and measure networks that name classes, and x does not"):
        quantize.lower_precision(tmp_path / "x.onnx", "float16", ModelInfo("x", (), {}, "segmentation"), pictures)
    with pytest.raises(InputError, match="int8 has to be calibrated: give a folder of pictures"):
        quantize.check_pictures("int8", None)
    (tmp_path / "one").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "one" / "x.png")
    with pytest.raises(InputError, match="holds one picture"):
        quantize.check_pictures("float16", tmp_path / "one")
    assert quantize.check_pictures("float16", None) == []
