"""Scenes of digits on disk, and the whole way on a handful of them: train, evaluate, draw; and what checkpoints must not do."""
import copy
import csv
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
import torch
from html_pages import Page
from mmengine.registry import DATASETS, MODELS
from PIL import Image
from pycocotools.coco import COCO

from zoo.checkpoints import without
from zoo.errors import InputError
from zoo.mm import corruptions, evaluate, report, train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.config import load_config, scope
from zoo.mm.downstream import SOURCES, check_parts, load_scene_model, predict_scenes, prepare, registered_only
from zoo.mm.networks import plain
from zoo.mm.training import evaluate_classes
from zoo.predicting.scenes import Scene, SceneInfo, draw
from zoo.predicting.supervision import read_detections
from zoo.reading.coco import box, run_lengths
from zoo.reading.digits import write_digit_scenes

ROOT = Path(__file__).parents[2]
SHORT = {
    "mask-rcnn_biformer-nano_fpn_digits": ["train_cfg.max_epochs=1", "train_cfg.val_interval=1"],
    "upernet_biformer-nano_digits": ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"],
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digit_scenes(folder, train=8, val=3, size=96)
    return folder


def test_both_formats_say_the_same(scenes):
    coco = COCO(scenes / "annotations" / "instances_train.json")
    assert len(coco.imgs) == 8 and coco.getCatIds() == list(range(10))
    for index, image in coco.imgs.items():
        labels = np.asarray(Image.open(scenes / "annotations" / "train" / image["file_name"]))
        assert Image.open(scenes / "images" / "train" / image["file_name"]).size == (image["width"], image["height"])
        expected = np.zeros_like(labels)
        for annotation in coco.imgToAnns[index]:
            mask = coco.annToMask(annotation).astype(bool)
            assert mask.sum() == annotation["area"] > 0 and not expected[mask].any()
            expected[mask] = annotation["category_id"] + 1
            left, top, width, height = annotation["bbox"]
            assert mask[top:top + height, left:left + width].sum() == mask.sum()
            assert mask[top].any() and mask[top + height - 1].any() and mask[:, left].any() and mask[:, left + width - 1].any()
        np.testing.assert_array_equal(labels, expected)


def test_scenes_depend_on_the_arguments_alone(scenes, tmp_path):
    write_digit_scenes(tmp_path, train=2, val=1, size=96)
    for path in tmp_path.rglob("*.png"):
        assert path.read_bytes() == (scenes / path.relative_to(tmp_path)).read_bytes()
    write_digit_scenes(tmp_path / "other", train=1, val=1, size=96, seed=1)
    name = "images/train/000000.png"
    assert (tmp_path / "other" / name).read_bytes() != (scenes / name).read_bytes()
    with pytest.raises(InputError, match="there has to be one"):
        write_digit_scenes(tmp_path, train=0)


@pytest.mark.parametrize("mask", [[[1, 0], [0, 1]], [[0, 0, 1]], [[1]], [[0, 1], [1, 1], [0, 0]]])
def test_run_lengths(mask):
    from pycocotools import mask as masks
    mask = np.array(mask, bool)
    encoded = masks.frPyObjects(run_lengths(mask), *mask.shape)
    np.testing.assert_array_equal(masks.decode(encoded), mask)
    left, top, width, height = box(mask)
    np.testing.assert_array_equal(masks.toBbox(encoded), [left, top, width, height])


@pytest.fixture(scope="module", params=SHORT)
def trained(request, scenes, tmp_path_factory) -> tuple[str, Path, dict]:
    folder = tmp_path_factory.mktemp("run")
    apart = f"visualizer.name={request.param}"  # the engine keeps one visualizer of a name in a process
    _, metrics = train(request.param, work_dir=folder, cfg_options=[f"data_root={scenes}", apart, *SHORT[request.param]])
    return request.param, folder, metrics


def test_training_leaves_curves_pictures_and_a_checkpoint_that_evaluates_alike(trained, scenes):
    name, folder, metrics = trained
    assert list(folder.rglob("events.out.tfevents*")) and list(folder.rglob("vis_image/*.png"))
    assert metrics and not list(folder.glob(".zoo-unfinished-*"))
    assert len(list(folder.glob("best_*.pth"))) == 1
    assert evaluate(name, latest_checkpoint(folder), cfg_options=[f"data_root={scenes}"]) == pytest.approx(metrics, nan_ok=True)


def test_a_report_has_what_the_toolbox_measures_and_the_pictures_that_went_worst(trained, scenes):
    name, folder, metrics = trained
    page = Page(report.write_report(folder))
    assert {"0", "9"} <= set(page.texts) and page.says(f"with biformer_nano on {scenes}")
    if name.startswith("mask"):
        assert page.says("coco bbox, held-out data") and page.says("missed: given, and not found") and "AP50, %" in page.texts
        assert f"{metrics['coco/bbox_mAP']:.3f}" in page.texts and len(page.pictures) == 3
        assert "mask AP, %" in page.texts
    else:
        assert f"{metrics['mIoU']:.1f}%" in page.texts and page.says("held-out data, %") and len(page.pictures) == 3 * 4


def test_a_report_shows_boxes_that_are_missed_or_false_and_no_others(scenes):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    config = load_config("mask-rcnn_biformer-nano_fpn_digits", [f"data_root={scenes}"])
    with scope(config):
        dataset = DATASETS.build(config.val_dataloader.dataset)
    shown = []
    for shift in (0, 0, 500):  # the annotations themselves; less the first of the second picture; elsewhere
        answers = report._Detections(dataset)
        for index in range(len(dataset)):
            info = dataset.get_data_info(index)
            given = info["instances"][1:] if len(shown) == 1 and index == 1 else info["instances"]
            sample = DetDataSample(metainfo={"img_path": info["img_path"]})
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor([each["bbox"] for each in given]).reshape(-1, 4) + shift, scores=torch.linspace(0.9, 0.5, len(given)),
                labels=torch.tensor([each["bbox_label"] for each in given]))
            answers.add({}, [sample])
        shown.append(answers.said([])["mistakes"].shown)
    assert not shown[0] and [mistake.title for mistake in shown[1]] == ["1 missed, 0 false"] and len(shown[2]) == len(dataset)
    assert shown[1][0].caption.startswith("000001.png; ")


def test_rows_of_classes_agree_with_the_metrics(trained, scenes):
    name, folder, metrics = trained
    _, rows = evaluate_classes(name, latest_checkpoint(folder), cfg_options=[f"data_root={scenes}"])
    if name.startswith("upernet"):
        ious = [row["iou"] for row in rows if not math.isnan(row["iou"])]
        assert [row["class"] for row in rows][:2] == ["ground", "0"] and np.mean(ious) == pytest.approx(metrics["mIoU"], abs=0.006)
        return
    config = load_config(name, [f"data_root={scenes}"])
    truth = COCO(config.test_evaluator.ann_file)
    assert [row["boxes"] for row in rows] == [len(truth.getAnnIds(catIds=[number])) for number in truth.getCatIds()]
    for column, metric in (("ap", "bbox_mAP"), ("ap50", "bbox_mAP_50"), ("mask_ap", "segm_mAP"), ("mask_ap75", "segm_mAP_75")):
        found = [row[column] for row in rows if not math.isnan(row[column])]
        assert np.mean(found) / 100 == pytest.approx(metrics[f"coco/{metric}"], abs=6e-4)


def test_average_precision_of_what_is_found_and_what_is_not(scenes):
    """The annotations themselves as answers, but for those of one class."""
    from zoo.mm.mmdet_parts import BoxTable
    path = scenes / "annotations/instances_val.json"
    truth = COCO(path)
    table = BoxTable(ann_file=str(path), metric="bbox")
    table.dataset_meta = {"classes": [str(i) for i in range(10)]}
    there = {annotation["category_id"] for annotation in truth.dataset["annotations"]}
    lost = min(there)
    for number in truth.imgs:
        kept = [annotation for annotation in truth.imgToAnns[number] if annotation["category_id"] != lost]
        boxes = np.array([annotation["bbox"] for annotation in kept], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        table.results.append(({}, {"img_id": number, "bboxes": boxes, "scores": np.ones(len(kept)),
                                   "labels": np.array([annotation["category_id"] for annotation in kept], int)}))
    nothing = {"bboxes": np.zeros((0, 4)), "scores": [], "labels": []}
    for answers in (table.results, [(given, found | nothing) for given, found in table.results]):
        table.compute_metrics(answers)
        for number, row in enumerate(table.rows):
            expected = math.nan if number not in there else 0 if number == lost or answers is not table.results else 100
            assert [row["ap"], row["ap50"], row["ap75"]] == pytest.approx([expected] * 3, nan_ok=True)


def test_errors_under_corruptions(trained, scenes, monkeypatch):
    name, folder, metrics = trained
    monkeypatch.setattr(corruptions, "CORRUPTIONS", ("contrast",))
    monkeypatch.setattr(corruptions, "SEVERITIES", (5,))
    seen = []
    monkeypatch.setattr(corruptions.CorruptImage, "_corrupt", lambda self, pixels: seen.append((self.name, pixels)) or pixels // 2)
    found = corruptions.evaluate_corruptions(name, latest_checkpoint(folder), cfg_options=[f"data_root={scenes}"])
    assert found.clean == pytest.approx(corruptions._error(metrics)) and 0 <= found.errors["contrast"][0] <= 100
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((scenes / "images/val").iterdir())]
    for (corruption, pixels), picture in zip(seen, pictures, strict=True):
        assert corruption == "contrast" and np.array_equal(pixels, picture)


def test_predictions_are_those_of_the_toolbox(trained, scenes):
    """Through the recorded steps, a picture comes to the model as through the config's pipeline."""
    from mmengine.registry import DATASETS, DefaultScope
    name, folder, _ = trained
    model, info = load_scene_model(latest_checkpoint(folder))
    config = load_config(name, [f"data_root={scenes}"])
    with DefaultScope.overwrite_default_scope(info.toolbox):
        item = DATASETS.build(config.val_dataloader.dataset)[1]
    with torch.inference_mode():
        expected = model.test_step({"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]})[0]
    scene, = predict_scenes(model, info, [scenes / "images/val/000001.png"], threshold=0)
    if info.toolbox == "mmseg":
        np.testing.assert_array_equal(scene.classes, expected.pred_sem_seg.data[0])
        assert info.classes[0] == "ground"
    else:
        np.testing.assert_allclose(np.sort(scene.scores), np.sort(expected.pred_instances.scores), rtol=1e-5)
        assert len(scene.masks) == len(scene.boxes) == len(scene.labels)


def test_the_tool_draws_folders(trained, scenes, tmp_path, capsys):
    name, folder, _ = trained
    main = importlib.import_module("zoo.tools.predict").main
    threshold = ["--threshold", "0.0"] if name.startswith("mask") else []
    assert main([str(latest_checkpoint(folder)), str(scenes / "images/val"), "-o", str(tmp_path / "out"), *threshold]) == 0
    endings = (".png",) if name.startswith("mask") else (".png", "_overlay.png")
    table = "answers.json" if name.startswith("mask") else "answers.csv"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {table, *(f"{i:06d}{ending}" for i in range(3) for ending in endings)}
    said = capsys.readouterr().out
    assert str(scenes / "images/val/000002.png") in said and f"wrote {1 + 3 * len(endings)} files" in said


def test_supervision_has_what_was_found(trained, scenes, tmp_path, monkeypatch, capsys):
    """examples/supervision_boxes.py on a checkpoint, and the file that `zoo predict` writes of the same pictures."""
    name, folder, _ = trained
    checkpoint, pictures = latest_checkpoint(folder), scenes / "images/val"
    monkeypatch.setattr("sys.argv", ["example", str(checkpoint), str(pictures), str(tmp_path / "drawn")])
    example = (ROOT / "examples" / "supervision_boxes.py").read_text().replace("threshold=0.3", "threshold=0.02")
    made: dict = {}
    exec(compile(example, "supervision_boxes.py", "exec"), made)
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {f"{i:06d}.png" for i in range(3)}
    assert f"{len(made['boxes'])} objects in 3 pictures" in capsys.readouterr().out and len(made["boxes"]) > 0
    assert set(made["boxes"].data["class_name"]) <= set(made["info"].classes)
    if name.startswith("mask"):
        written = tmp_path / "answers.json"
        main = importlib.import_module("zoo.tools.predict").main
        assert main([str(checkpoint), str(pictures), "--threshold", "0.02", "-o", str(written)]) == 0
        read = read_detections(written)
        for path, detections in made["found"].items():
            assert read[path].class_id.tolist() == detections.class_id.tolist() and np.array_equal(read[path].mask, detections.mask)
            np.testing.assert_allclose(read[path].xyxy, detections.xyxy, atol=2e-3)


def test_answers_are_what_was_found(trained, scenes, tmp_path):
    """Instances in COCO's form, which pycocotools reads; of a segmentor, label maps and how often each class occurs."""
    name, folder, _ = trained
    main = importlib.import_module("zoo.tools.predict").main
    (tmp_path / "text.png").write_text("no picture")
    pictures = [str(scenes / f"images/val/00000{i}.png") for i in range(3)]
    threshold = ["--threshold", "0.02"] if name.startswith("mask") else []
    arguments = [str(latest_checkpoint(folder)), pictures[0], str(tmp_path / "text.png"), *pictures[1:], *threshold]
    model, info = load_scene_model(latest_checkpoint(folder))
    found = list(predict_scenes(model, info, pictures, threshold=0.02))
    assert main([*arguments, "-o", str(tmp_path / "answers.json")]) == 1
    assert main([*arguments, "-o", str(tmp_path / "answers.csv")]) == 1
    records = json.loads((tmp_path / "answers.json").read_text())
    rows = list(csv.DictReader((tmp_path / "answers.csv").open()))
    if info.toolbox == "mmseg":
        assert [(row["picture"], row["label"], row["class"], row["pixels"]) for row in records] == [
            (picture, label, info.classes[label], count) for picture, scene in zip(pictures, found, strict=True)
            for label, count in enumerate(np.bincount(scene.classes.ravel(), minlength=len(info.classes)).tolist())]
        assert [int(row["pixels"]) for row in rows] == [row["pixels"] for row in records]
        assert main([str(latest_checkpoint(folder)), pictures[0], "-o", str(tmp_path / "map.png")]) == 0
        with Image.open(tmp_path / "map.png") as written:
            assert np.array_equal(written, found[0].classes)
            assert np.array_equal(np.asarray(written.convert("RGB")), info.colours[found[0].classes])
        return
    assert info.category_ids == tuple(range(10))  # as the annotations number them, not from 1
    truth = COCO()
    truth.dataset = {"images": [{"id": i, "width": 96, "height": 96} for i in (1, 3, 4)], "annotations": [],
                     "categories": [{"id": i, "name": name} for i, name in zip(info.category_ids, info.classes, strict=True)]}
    truth.createIndex()
    results = truth.loadRes(str(tmp_path / "answers.json"))
    assert len(records) == len(rows) == sum(len(scene.labels) for scene in found) > 0
    for number, picture, scene in zip((1, 3, 4), pictures, found, strict=True):
        annotations = results.imgToAnns[number]
        assert [annotation["file_name"] for annotation in annotations] == [picture] * len(scene.labels)
        for annotation, label, score, edges, mask in zip(annotations, scene.labels, scene.scores, scene.boxes, scene.masks, strict=True):
            assert (annotation["category_id"], annotation["category_name"]) == (label, info.classes[label])
            left, top, width, height = annotation["bbox"]
            np.testing.assert_allclose([left, top, left + width, top + height], edges, atol=2e-3)
            assert annotation["score"] == pytest.approx(score, abs=1e-6)
            np.testing.assert_array_equal(results.annToMask(annotation), mask)
    assert [row["class"] for row in rows] == [record["category_name"] for record in records]


def test_drawings(tmp_path):
    Image.new("RGB", (40, 30), "black").save(tmp_path / "a.png")
    info = SceneInfo("mmdet", ("cat", "dog"), np.array([[255, 0, 0], [0, 255, 0]], np.uint8), [])
    mask = np.zeros((1, 30, 40), bool)
    mask[0, 5:10, 5:10] = True
    found = Scene(tmp_path / "a.png", np.array([1]), np.array([0.9]), np.array([[4.0, 4.0, 20.0, 20.0]]), mask)
    pixels = np.asarray(draw(found, info))
    assert pixels.shape == (30, 40, 3) and tuple(pixels[20, 12]) == (0, 255, 0) and tuple(pixels[25, 30]) == (0, 0, 0)
    classes = np.zeros((30, 40), int)
    assert tuple(np.asarray(draw(Scene(tmp_path / "a.png", classes=classes), info))[0, 0]) == (127, 0, 0)
    assert Scene(Path(), classes=classes).described(info.classes) == ["cat  100.0%"]


def _record(toolbox: str) -> dict:
    name = {"mmdet": "mask-rcnn_biformer-nano_fpn_digits", "mmseg": "upernet_biformer-nano_digits"}[toolbox]
    return {"task": toolbox, "model": plain(load_config(name).model), "steps": [], "classes": ["a"], "palette": None}


def _changed(record: dict, place: str, value: object) -> dict:
    """The record with `value` at a place like "model.backbone.name"."""
    changed = copy.deepcopy(record)
    *parents, last = place.split(".")
    node = changed
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node[name]
    node[last] = value
    return changed


POPEN = {"type": "subprocess.Popen", "args": ["touch", "pwned"]}


@pytest.mark.parametrize(("toolbox", "place", "value", "message"), [
    ("mmseg", "model", POPEN, "would run 'subprocess.Popen' on loading and is refused: mmseg has no such part"),
    ("mmdet", "model", POPEN, "would run 'subprocess.Popen' on loading"),
    ("mmseg", "model.backbone", POPEN, "would run 'subprocess.Popen'"),
    ("mmseg", "model.decode_head.loss_decode", [({"losses": [POPEN]},)], "would run 'subprocess.Popen'"),
    ("mmseg", "steps", [POPEN], "would run 'subprocess.Popen'"),
    ("mmseg", "steps", [{"type": "Compose", "transforms": [POPEN]}], "would run 'subprocess.Popen'"),
    ("mmseg", "steps", [{"type": "RandomResize", "scale": 8, "resize_type": "subprocess.Popen"}],
     "would open, download or run 'subprocess.Popen' on loading and is refused: it is the value of 'resize_type'"),
    ("mmdet", "model.test_cfg.rpn.nms.type", "__import__('os').mkdir('pwned')", "would run .* mmdet has no such part"),
    ("mmdet", "model.rpn_head", {"type": "CameraMotionCompensation", "warp_mode": "open('pwned', 'w')"}, "is the value of 'warp_mode'"),
    ("mmdet", "model", {"type": "LAD", "teacher_config": "evil.py"}, "or run 'evil.py' on .* value of 'teacher_config'"),
    ("mmseg", "model.decode_head.loss_decode.class_weight", "http://nowhere/x.pkl", "is the value of 'class_weight'"),
    ("mmseg", "model.decode_head.loss_decode.class_weight", "weights.pkl", "is the value of 'class_weight'"),
    ("mmseg", "model.backbone.name", "hf-hub:some/body", "is the value of 'name'"),
    ("mmseg", "model.backbone._scope_", "evil", "would import 'evil' on loading and is refused: only parts of mmseg are built"),
    ("mmseg", "model.backbone.type", "evil", "would run 'evil'"),
    ("mmseg", "model.backbone.type", "evil.TimmBackbone", "would run 'evil.TimmBackbone'"),
    ("mmseg", "model.backbone.type", "mmdet.subprocess", "would run 'mmdet.subprocess'"),
    ("mmseg", "model.backbone.type", 3, "would run 3 "),
    ("mmseg", "model.backbone.type", None, "would run None "),
    ("mmseg", "model.backbone.args", {"act_layer": {1, 2}}, "records a set as 'act_layer'"),
    ("mmseg", "model", 3, "records model=3, where a dict of parts is needed"),
    ("mmseg", "model", {}, "records a model that mmseg cannot build: "),
    ("mmseg", "model", {"type": "ReLU"}, "records a ReLU, which is neither a detector nor a segmentor"),
    ("mmseg", "model.backbone.args", {"depht": 3}, "records a model that mmseg cannot build: .*depht"),
    ("mmseg", "steps", None, "does not record 'steps', where a list of dicts is needed"),
    ("mmseg", "steps", [3], r"records steps=\[3\], where a list of dicts is needed"),
    ("mmseg", "classes", 5, "records classes=5, where a list of names is needed"),
    ("mmseg", "palette", [[0, 0, 256]], "records palette=.*, where a list of colours"),
])
def test_records_that_would_run_or_read_something_else_are_refused(tmp_path, monkeypatch, toolbox, place, value, message):
    monkeypatch.chdir(tmp_path)
    for name in ("evil.py", "evil/registry.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("open('pwned', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"zoo": _changed(_record(toolbox), place, value), "state_dict": {}}, "x.pth")
    with pytest.raises(InputError, match=f"x.pth .*{message}"):
        load_scene_model("x.pth")
    assert not Path("pwned").exists() and "evil" not in sys.modules


def test_the_tools_refuse_code_in_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"zoo": _changed(_record("mmseg"), "model", POPEN), "state_dict": {}}, "x.pth")
    Image.new("RGB", (9, 9)).save("a.png")
    for tool, arguments in [("predict", ["a.png", "-o", "o.png"]), ("export", ["-o", "o.onnx"])]:
        with pytest.raises(InputError, match="would run"):
            importlib.import_module(f"zoo.tools.{tool}").main(["x.pth", *arguments])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "x.pth"]


def test_nothing_is_imported_for_names_that_are_not_registered(tmp_path, monkeypatch):
    """Also where the toolbox makes a `type` of another argument."""
    (tmp_path / "evil.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    step = {"type": "RandomResize", "scale": (8, 8), "resize_type": "evil"}
    info = SceneInfo("mmseg", (), np.zeros((0, 3), np.uint8), [step])
    with pytest.raises(InputError, match="the recorded step 'RandomResize' cannot be built: .*evil is not in the mmseg::transform"):
        prepare(info, Image.new("RGB", (8, 8)))
    with registered_only("mmseg"), pytest.raises(KeyError, match=r"torch.nn.ReLU is not in"):
        MODELS.build({"type": "torch.nn.ReLU"})
    assert isinstance(MODELS.build({"type": "torch.nn.ReLU"}), torch.nn.ReLU)


def test_what_training_started_from_is_not_read_again(tmp_path, monkeypatch):
    """The files may be gone, or somebody else's; the weights are the checkpoint's."""
    config = load_config("upernet_biformer-nano_digits")
    with scope(config):
        state = MODELS.build(config.model).state_dict()
    record = _record("mmseg")
    record["model"].update(pretrained="http://nowhere/a.pth", init_cfg={"type": "Pretrained", "checkpoint": "http://nowhere/a.pth"})
    record["model"]["backbone"].update(checkpoint="gone.pth", args={"pretrained": True, "checkpoint_path": "gone.pth"})
    torch.save({"zoo": record, "state_dict": state}, tmp_path / "x.pth")
    model, _ = load_scene_model(tmp_path / "x.pth")
    assert model.backbone.checkpoint is None and all(value.equal(state[key]) for key, value in model.state_dict().items())


def test_parts_of_every_config_are_let_through():
    for path in sorted([*(ROOT / "configs/detection").glob("*.py"), *(ROOT / "configs/segmentation").glob("*.py")]):
        config = load_config(path)
        toolbox = config.get("default_scope")
        if toolbox in ("mmdet", "mmseg"):
            steps = [step for step in config.val_dataloader.dataset.pipeline if not step.type.startswith(("Load", "Pack"))]
            check_parts(path, toolbox, without([plain(config.model), *plain(steps)], SOURCES))
