import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from zoo.checkpoints import ModelInfo, load_model
from zoo.errors import InputError
from zoo.exporting import onnx as export
from zoo.exporting.onnx import ExportError, export_onnx
from zoo.layers import DAS

DATA_CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3), "interpolation": "bicubic", "crop_pct": 0.9}
INFO = ModelInfo("small", ("cat", "dog", "émeu"), DATA_CONFIG)


class Small(nn.Module):
    """As little as has a batch, a height and a width; `add` makes variants that cannot do without knowing them."""

    def __init__(self, add=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.add = add

    def forward(self, x):
        x = self.conv(x)
        return (x if self.add is None else self.add(x)).mean((2, 3))


def input_shape(path) -> list:
    return onnxruntime.InferenceSession(str(path)).get_inputs()[0].shape


def run(path, images: torch.Tensor) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, {"image": images.numpy()})[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = Small().eval()
    return model, export_onnx(model, INFO, tmp_path_factory.mktemp("export") / "x.onnx")


def test_exports_free_batch_height_and_width(exported):
    _, result = exported
    assert (result.free_batch, result.free_size, result.reason) == (True, True, "")
    assert input_shape(result.path) == ["batch", 3, "height", "width"]
    onnx.checker.check_model(str(result.path), full_check=True)


def test_compares_other_batches_and_sizes_than_the_traced(exported):
    _, result = exported
    assert {(row.batch, row.size) for row in result.comparisons} >= {(1, (32, 32)), (3, (32, 32))}
    sizes = {row.size for row in result.comparisons}
    assert any(height % 2 for height, _ in sizes)
    assert any(height < 32 for height, _ in sizes)
    assert any(height != width for height, width in sizes)
    assert result.worst == max(row.difference for row in result.comparisons) < 1e-4


def test_computes_what_pytorch_computes_on_an_unforeseen_shape(exported):
    model, result = exported
    images = torch.randn(5, 3, 50, 21)
    with torch.inference_mode():
        np.testing.assert_allclose(run(result.path, images), model(images).numpy(), atol=1e-5)


def test_records_classes_and_preprocessing(exported):
    _, result = exported
    found = onnxruntime.InferenceSession(str(result.path)).get_modelmeta().custom_metadata_map
    found = {key: json.loads(value) for key, value in found.items()}
    assert found.pop("task") == "classification" and found.pop("model") == "small"
    assert found.pop("classes") == ["cat", "dog", "émeu"]
    assert found == {key: list(value) if isinstance(value, tuple) else value for key, value in DATA_CONFIG.items()}


def test_file_holds_no_paths_of_this_machine(exported):
    _, result = exported
    assert b".py" not in result.path.read_bytes()
    assert list(result.path.parent.iterdir()) == [result.path]


def test_fixed_size_and_batch_as_asked(tmp_path):
    result = export_onnx(Small().eval(), INFO, tmp_path / "x.onnx", size=(24, 17), free_size=False, batch=2)
    assert input_shape(result.path) == [2, 3, 24, 17]
    assert [(row.batch, row.size) for row in result.comparisons] == [(2, (24, 17))]
    assert (result.free_batch, result.free_size, result.reason) == (False, False, "as asked")


@pytest.mark.parametrize("opset", [export.OPSETS[0], export.OPSETS[-1]])
def test_opset(tmp_path, opset):
    export_onnx(Small().eval(), INFO, tmp_path / "x.onnx", opset=opset)
    assert onnx.load(tmp_path / "x.onnx").opset_import[0].version == opset


@pytest.mark.parametrize(("opset", "spell_out"), [(20, False), (20, True), (18, False)])
def test_deformable_convolutions_are_the_standard_operator_or_spelled_out(tmp_path, opset, spell_out):
    result = export_onnx(Small(DAS(3)).eval(), INFO, tmp_path / "x.onnx", opset=opset, spell_out=spell_out)
    assert result.free_size, result.reason
    operators = [node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node]
    standard = opset >= 19 and not spell_out
    assert operators.count("DeformConv" if standard else "GridSample") == 1
    assert ("GridSample" if standard else "DeformConv") not in operators


@pytest.mark.parametrize(("name", "size"), [("attention_unet_nano", (16, 24)), ("attention_unet3d_nano", (8, 8, 12))])
def test_networks_that_segment_have_free_sizes_in_2d_and_3d(tmp_path, name, size):
    model, info = load_model(name, widths=(4, 6, 8))
    result = export_onnx(model, info, tmp_path / "x.onnx", size=size)
    assert result.free_size, result.reason
    assert input_shape(result.path)[2:] == ["depth", "height", "width"][-len(size):]
    images = torch.randn(2, model.in_chans, *(5, 3, 9)[:len(size)])
    with torch.inference_mode():
        np.testing.assert_allclose(run(result.path, images), model(images).numpy(), atol=1e-5)
    with pytest.raises(InputError, match=r"the size 8 has 1 numbers, where (depth and )?height and width are needed"):
        export_onnx(model, info, tmp_path / "y.onnx", size=(8,))


def test_size_is_fixed_and_said_so_where_the_model_takes_no_other(tmp_path):
    model, info = load_model("test_vit")
    result = export_onnx(model, info, tmp_path / "x.onnx")
    assert input_shape(result.path) == ["batch", 3, 160, 160]
    assert not result.free_size
    assert "test_vit does not take 161x161" in result.reason


def pad_to_seventh(x: torch.Tensor) -> torch.Tensor:
    """Exports wrongly for widths that 7 does not divide: Python divides downwards, ONNX towards zero."""
    seventh = -(-x.shape[3] // 7)
    return nn.functional.pad(x, (0, 7 * seventh - x.shape[3])).unflatten(3, (7, seventh)).flatten(3)


class Counted(Small):
    """Traces with the height as a constant."""

    def forward(self, x):
        return super().forward(x * sum(range(x.shape[2])))


@pytest.mark.parametrize(("model", "reason"), [
    (Counted(), "tracing small failed"),
    (Small(lambda x: x + torch.arange(x.shape[2])[:, None].remainder(x.shape[3]) / 99), "tracing small failed: Error when translating"),
    (Small(lambda x: pad_to_seventh(x)[..., :x.shape[3]] + x), "ONNX Runtime does not run batch 1, 57x57"),
    (Small(pad_to_seventh), "ONNX Runtime differs from PyTorch by .* at batch 1, 57x57, more than 0.0001"),
    (Small(lambda x: x * sum(range(x.shape[2]))), "ONNX Runtime differs from PyTorch by .* at batch 1, 56x56, more than 0.0001"),
])
def test_size_is_fixed_and_said_so_where_the_graph_is_wrong_at_others(tmp_path, model, reason):
    result = export_onnx(model.eval(), INFO, tmp_path / "x.onnx", size=(56, 56))
    assert not result.free_size
    assert re.search(reason, result.reason)
    assert input_shape(result.path) == ["batch", 3, 56, 56]
    assert {row.size for row in result.comparisons} == {(56, 56)}
    assert list(tmp_path.iterdir()) == [result.path]


def test_a_difference_fails_and_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.onnx"
    path.write_text("before")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match=r"differs from PyTorch by .* at batch 1, 32x32, more than -1"):
        export_onnx(Small().eval(), INFO, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


class _OffByALittle:
    def __init__(self, *arguments, **options):
        self.session = onnxruntime.capi.onnxruntime_inference_collection.InferenceSession(*arguments, **options)

    def run(self, *arguments):
        return [output + self.offset for output in self.session.run(*arguments)]


@pytest.mark.parametrize("offset", [2e-4, float("nan")])
def test_what_onnx_runtime_answers_is_what_is_compared(tmp_path, monkeypatch, offset):
    monkeypatch.setattr(_OffByALittle, "offset", offset, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", _OffByALittle)
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export_onnx(Small().eval(), INFO, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("layer", "reason"), [
    (lambda x: x * float(x.sum() > 0), "data-dependent"),
    (lambda x: x * len(x), r"a static shape of 2 for dimension inputs\[0\]\.shape\[0\]"),
])
def test_a_model_that_cannot_be_exported_fails(tmp_path, layer, reason):
    with pytest.raises(ExportError, match=f"tracing small failed: .*{reason}"):
        export_onnx(Small(layer).eval(), INFO, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"opset": 17}, "opset 17 is not available; 18 to"),
    ({"size": (0, 32)}, "the size 0x32 is not positive"),
    ({"batch": 0}, "the batch size 0 is not positive"),
])
def test_arguments_that_cannot_be_used(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        export_onnx(Small().eval(), INFO, tmp_path / "x.onnx", **arguments)


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"needs the package onnxscript; install it with: pip install 'zoo-attention\[export\]'"):
        export_onnx(Small().eval(), INFO, tmp_path / "x.onnx")


def test_size_that_the_model_does_not_take_is_one_sentence(tmp_path):
    model, info = load_model("test_vit")
    with pytest.raises(InputError, match="test_vit does not take 30x30 images"):
        export_onnx(model, info, tmp_path / "x.onnx", size=(30, 30))
