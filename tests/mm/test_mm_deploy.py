"""Segmentors and RetinaNet as ONNX files: the same logits and boxes as the toolboxes', with the recorded steps around them."""
import json

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
import onnxruntime
import torch
from mmengine.registry import MODELS
from PIL import Image
from reduced import reduced
from torch import nn

from zoo.errors import InputError
from zoo.exporting.adaptive_pooling import AdaptiveAvgPool
from zoo.exporting.onnx import export_onnx
from zoo.mm.config import load_config, scope
from zoo.mm.deploy import deployable
from zoo.mm.downstream import predict_scenes
from zoo.mm.networks import plain
from zoo.predicting.detections import detections
from zoo.predicting.exported import ExportedNetwork, exported_scene_info, predict_exported
from zoo.predicting.scenes import SceneInfo
from zoo.tools import export

EXPORTED = ["upernet_biformer-small_8xb2-160k_ade20k-512x512", "sem-fpn_attnet-t2_4xb4-80k_ade20k-512x512",
            "retinanet_litv2-s_fpn_1x_coco"]


def _small(config_name: str) -> tuple[nn.Module, SceneInfo]:
    """The config's model at reduced size, and the steps that a picture of 96×64 pixels goes through."""
    torch.manual_seed(0)
    config = reduced(load_config(config_name))
    with scope(config):
        model = MODELS.build(config.model).eval()
    for name, part in model.named_modules():  # outputs that differ from place to place
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
            if name.startswith("bbox_head.retina"):
                part.weight.data *= 0.1
    steps = [{"type": "Resize", "scale": (96, 64), "keep_ratio": True}]
    classes = tuple(f"class {i}" for i in range(80 if config.default_scope == "mmdet" else 150))
    return model, SceneInfo(config.default_scope, classes, np.zeros((150, 3), np.uint8), steps)


@pytest.mark.long
@pytest.mark.parametrize("name", EXPORTED)
def test_the_file_computes_what_the_toolbox_does(name, tmp_path):
    model, info = _small(name)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    if info.toolbox == "mmdet":
        model.test_cfg.score_thr, model.test_cfg.nms_pre = 0.85, 4000  # candidates of a level, more than score above that
    scene, = predict_scenes(model, info, [tmp_path / "a.png"], threshold=0)

    network, described = deployable(model, info)
    exported = export_onnx(network, described, tmp_path / "a.onnx")
    assert exported.free_size and exported.free_batch, exported.reason
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["input_size"] == [3, 64, 96] and said["steps"][0]["scale"] == [96, 64] and len(said["classes"]) == len(info.classes)
    image = ((pixels / 255 - said["mean"]) / said["std"]).astype(np.float32).transpose(2, 0, 1)[None]
    found, = session.run(None, {"image": image})
    if info.toolbox == "mmseg":
        assert (found[0].argmax(0) == scene.classes).mean() > 0.999
    else:
        test_cfg = said["test_cfg"]
        boxes, scores, classes = detections(
            found[0], (64, 96), score_thr=test_cfg["score_thr"], iou_threshold=test_cfg["nms"]["iou_threshold"],
            max_per_img=test_cfg["max_per_img"])
        ours, theirs = (np.lexsort((-s, c)) for s, c in ((scores, classes), (scene.scores, scene.labels)))  # some scores nearly tie
        np.testing.assert_array_equal(classes[ours], scene.labels[theirs])
        np.testing.assert_allclose(scores[ours], scene.scores[theirs], rtol=1e-4)
        np.testing.assert_allclose(boxes[ours], scene.boxes[theirs], atol=1e-2)


@pytest.mark.parametrize("name", EXPORTED[1:])
def test_the_guides_lines_and_the_tool_answer_as_the_toolbox(name, tmp_path, run_block, documented_keys):
    model, info = _small(name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    if info.toolbox == "mmdet":
        model.test_cfg.nms_pre = 4000
    scene, = predict_scenes(model, info, [tmp_path / "picture.png"], threshold=0.3)
    kind = {"mmseg": "segmentor", "mmdet": "detector"}[info.toolbox]
    export_onnx(*deployable(model, info), tmp_path / f"{kind}.onnx", free_size=False)
    network = ExportedNetwork(tmp_path / f"{kind}.onnx")
    assert set(network.said) == documented_keys("toolboxes", {"segmentor": "segmentors of mmsegmentation", "detector": "detectors"}[kind])
    found = run_block("exporting.md", f"onnx-{kind}", tmp_path)
    again, = predict_exported(network, [tmp_path / "picture.png"], threshold=0.3)
    described = exported_scene_info(network)
    assert described.classes == info.classes and np.array_equal(described.colours, info.colours)
    if kind == "segmentor":
        for labels in (found["labels"], again.classes):
            assert labels.shape == (40, 60) and (labels == scene.classes).mean() > 0.999
        return
    assert len(scene.scores) > 3
    kept = found["kept"][:found["said"]["test_cfg"]["max_per_img"]]
    at, named = found["anchors"][kept], found["labels"][kept]
    edges = np.hstack([found["boxes"][at][:, :2], found["boxes"][at][:, :2] + found["boxes"][at][:, 2:]])
    for labels, scores, boxes in ((named, found["found"][at, 4 + named], edges), (again.labels, again.scores, again.boxes)):
        ours, theirs = np.lexsort((-scores, labels)), np.lexsort((-scene.scores, scene.labels))
        np.testing.assert_array_equal(labels[ours], scene.labels[theirs])
        np.testing.assert_allclose(scores[ours], scene.scores[theirs], rtol=1e-4)
        np.testing.assert_allclose(boxes[ours], scene.boxes[theirs], atol=1e-2)


def test_windows_are_averaged_as_the_toolbox_averages_them(tmp_path):
    model, info = _small(EXPORTED[1])
    model.test_cfg.update(mode="slide", crop_size=(32, 48), stride=(20, 40))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    scene, = predict_scenes(model, info, [tmp_path / "a.png"])
    export_onnx(*deployable(model, info), tmp_path / "a.onnx", size=(32, 48), free_size=False)
    again, = predict_exported(ExportedNetwork(tmp_path / "a.onnx"), [tmp_path / "a.png"])
    assert (again.classes == scene.classes).mean() > 0.999 and len(np.unique(scene.classes)) > 1


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(7, 5), (6, 12), (2, 3), (1, 1)])
def test_pooling_by_matrices(size, shape):
    x = torch.randn(2, 3, *shape)
    torch.testing.assert_close(AdaptiveAvgPool(size)(x), nn.AdaptiveAvgPool2d(size)(x))


def test_what_remains_of_detections():
    found = np.array([[0, 0, 0.5, 0.5, 0.9, 0.6], [0, 0, 0.5, 0.6, 0.8, 0.0], [0.5, 0.5, 1, 1, 0.7, 0.0], [0, 0, 1, 1, 0.01, 0.02],
                      [0, 0.2, 0, 0.8, 0.95, 0.0]])  # the last has no area
    boxes, scores, classes = detections(found, (10, 20), score_thr=0.05, iou_threshold=0.5, max_per_img=100)
    np.testing.assert_allclose(boxes, [[0, 0, 10, 5], [10, 5, 20, 10], [0, 0, 10, 5]])
    assert scores.tolist() == [0.9, 0.7, 0.6] and classes.tolist() == [0, 0, 1]
    assert len(detections(found, (10, 20), score_thr=0.05, iou_threshold=0.5, max_per_img=2)[0]) == 2


def test_a_checkpoint_is_enough(tmp_path):
    """Of its config nothing is needed; the tool loads it the same way."""
    name = "upernet_biformer-nano_digits"
    config = load_config(name)
    with scope(config):
        model = MODELS.build(config.model)
    record = {"task": "mmseg", "model": plain(config.model), "steps": [], "classes": ["a"] * 11, "palette": None}
    torch.save({"zoo": record, "state_dict": model.state_dict()}, tmp_path / "a.pth")
    network, info = export.load(str(tmp_path / "a.pth"))
    assert info.name == "biformer_nano" and info.output == "logits" and network(torch.randn(1, 3, 70, 50)).shape == (1, 11, 70, 50)


def test_other_detectors_are_refused():
    with pytest.raises(InputError, match="MaskRCNN cannot"):
        deployable(type("MaskRCNN", (), {})(), SceneInfo("mmdet", (), np.zeros((0, 3)), []))
