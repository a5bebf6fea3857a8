"""What a model with parts of zoo goes through in Ultralytics: training, saving, resuming, other processes, exporting."""
import copy
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils.dist import generate_ddp_file
from ultralytics.utils.torch_utils import ModelEMA

import zoo.yolo
from zoo.layers import DAS
from zoo.reading.digits import Digits

SMALL = {  # layers of every kind: maps, tokens, a width of its own, two inputs, after the sums
    "nc": 3, "backbone": [[-1, 1, "Conv", [8, 3, 4]], [-1, 1, "DeformableTokenMerging", [16]], [-1, 1, "C3k2+DAS", [16, True]],
                          [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "BiLevelRoutingAttention", {"num_heads": 2, "regions": 2, "topk": 2}],
                          [[2, -1], 1, "AttentionGate", []], [-1, 1, "TokenAwareAvgPool", []], [-1, 1, "ATConv", []]],
    "head": [[[7, 4], 1, "Detect", ["nc"]]]}


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DAS)]


def test_training_rebuilds_the_model_and_gives_back_what_it_saved(trained):
    assert len(layers_of(trained.model)) == 4 and trained.model.names[9] == "9"
    assert trained.trainer.epoch == 0 and Path(trained.trainer.best).is_file()
    assert any(name.endswith("attached.0.gate") and value.abs().max() > 0 for name, value in trained.model.named_parameters())


FRESH = """
import sys
from ultralytics import YOLO
model = YOLO(sys.argv[1])
print([type(module).__name__ for module in model.model.modules()].count("DAS"))
picture, = model.predict(sys.argv[2], imgsz=64, conf=0.0001, verbose=False)
print(picture.boxes.data.sum().item())
model.train(data=sys.argv[3], epochs=1, imgsz=64, batch=4, workers=0, plots=False, device="cpu", project=sys.argv[4], verbose=False)
print([type(module).__name__ for module in model.model.modules()].count("DAS"))
"""


def test_a_checkpoint_works_and_trains_on_where_nothing_is_imported(trained, digits, fresh_process, tmp_path):
    picture = digits / "images" / "val" / "000000.png"
    code = tmp_path / "fresh.py"
    code.write_text(FRESH)
    said = fresh_process(code, trained.trainer.best, picture, digits / "digits.yaml", tmp_path).splitlines()
    here, = YOLO(trained.trainer.best).predict(picture, imgsz=64, conf=0.0001, verbose=False)
    assert (said[0], said[-1]) == ("4", "4")
    assert float(said[1]) == pytest.approx(here.boxes.data.sum().item(), rel=1e-3)


RESTRICTED = """
import sys
import zoo.yolo
from ultralytics import YOLO
for file in sys.argv[1:]:
    print(sum(p.numel() for p in YOLO(file).model.parameters()))
"""


def test_checkpoints_load_without_arbitrary_code(trained, fresh_process, tmp_path):
    backbone = YOLO("yolo11n-biformer_nano.yaml", verbose=False)
    backbone.save(tmp_path / "backbone.pt")
    code = tmp_path / "restricted.py"
    code.write_text(RESTRICTED)
    files = Path(trained.trainer.best), tmp_path / "backbone.pt"
    said = fresh_process(code, *files, ULTRALYTICS_SAFE_LOAD="1").splitlines()
    assert said[-2:] == [str(sum(p.numel() for p in model.model.parameters())) for model in (trained, backbone)]


def test_restricted_loading_still_refuses_what_is_no_module(tmp_path):
    torch.save({"model": zoo.yolo.model_file}, tmp_path / "other.pt")
    with pytest.raises(TypeError, match="outside the supported"):
        torch_safe_load(tmp_path / "other.pt", safe_only=True)


def test_a_training_that_was_stopped_resumes(train, digits):
    class StopError(Exception):
        pass

    def stop(trainer):
        if trainer.epoch == 0:
            raise StopError

    model = YOLO("yolo11n-das.yaml", verbose=False)
    model.add_callback("on_model_save", stop)
    with pytest.raises(StopError):
        train(None, digits / "digits.yaml", model, epochs=2)
    again = YOLO(model.trainer.last, verbose=False)
    again.train(resume=True)
    assert again.trainer.start_epoch == 1 and again.trainer.epoch == 1 and len(layers_of(again.model)) == 4


def test_processes_of_a_distributed_training_know_the_names(digits, tmp_path, fresh_process):
    """Ultralytics distributes over GPUs only; what its processes run is run here, in one that finds a model by its name."""
    trainer = DetectionTrainer(overrides=dict(model="yolo11n-das.yaml", data=str(digits / "digits.yaml"), epochs=1, imgsz=64, batch=4,
                                              workers=0, plots=False, device="cpu", project=str(tmp_path), name="run", verbose=False))
    script = Path(generate_ddp_file(trainer))
    assert "zoo" not in script.read_text().split("from ultralytics")[1]
    fresh_process(script)
    assert len(layers_of(YOLO(tmp_path / "run" / "weights" / "best.pt").model)) == 4


@pytest.fixture(scope="module")
def small():
    from ultralytics.nn.tasks import DetectionModel
    return DetectionModel(copy.deepcopy(SMALL), verbose=False)


def test_averages_of_weights_follow(small):
    model = copy.deepcopy(small)
    average = ModelEMA(model, decay=0.5, tau=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update(model)
    changed = [torch.equal(a, b) for a, b in zip(average.ema.parameters(), small.parameters(), strict=True) if a.dtype.is_floating_point]
    assert not any(changed)
    average.ema.eval()(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns(small, dtype):
    model = copy.deepcopy(small).train()
    with torch.autocast("cpu", dtype):
        out = model(torch.rand(2, 3, 64, 64))
    loss = sum(leaf.float().square().mean() for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_half_of_it_is_what_it_was(small):
    """Ultralytics saves models in half precision, and validates so on GPUs."""
    image = torch.rand(1, 3, 64, 64)
    whole = copy.deepcopy(small).eval()
    assert torch.allclose(copy.deepcopy(whole).half()(image.half())[0].float(), whole(image)[0], atol=0.05, rtol=0.05)


def test_fusing_changes_nothing(small):
    model = copy.deepcopy(small).eval()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
    image = torch.rand(2, 3, 64, 96)
    before = model(image)[0]
    fused = model.fuse(verbose=False)
    assert fused.is_fused() and torch.allclose(fused(image)[0], before, atol=1e-3, rtol=1e-4)


def test_an_exported_model_of_free_sizes_gives_the_same(small, tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.chdir(tmp_path)
    model = YOLO("small.yaml", verbose=False)
    model.model.load_state_dict(small.state_dict())
    file = model.export(format="onnx", dynamic=True, simplify=False, imgsz=64, device="cpu")
    session = onnxruntime.InferenceSession(file)
    assert [i.name for i in session.get_inputs()] == ["images"] and [o.name for o in session.get_outputs()] == ["output0"]
    network = copy.deepcopy(small).eval()
    for batch, height, width in ((1, 64, 64), (3, 64, 128), (2, 160, 96)):
        image = torch.rand(batch, 3, height, width)
        found, = session.run(None, {"images": image.numpy()})
        with torch.no_grad():
            expected = network(image)[0].numpy()
        assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-3 * expected.std()


@pytest.mark.parametrize(("file", "data", "metric"), [
    ("yolo26n-gates-seg.yaml", "digits.yaml", "metrics/mAP50(M)"), ("yolo11n-polarized-pose.yaml", "digits-pose.yaml", "metrics/mAP50(P)")])
def test_masks_and_key_points_are_learnt(train, digits, file, data, metric):
    assert metric in train(file, digits / data).metrics.results_dict


def test_classes_are_learnt(train, tmp_path):
    for split in ("train", "val"):
        digits = Digits(split, limit=20)
        for index in range(20):
            picture, label = digits.read(index)
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            picture.convert("RGB").save(folder / f"{index}.png")
    model = train("yolo11n-biformer_nano-cls.yaml", tmp_path / "data")
    assert model.task == "classify" and 0 <= model.metrics.top1 <= 1


def test_nothing_of_zoo_imports_ultralytics(fresh_process):
    said = fresh_process("-c", "import sys, zoo, zoo.tools, zoo.exporting.onnx; print([n for n in sys.modules if 'ultralytics' in n])")
    assert said.strip() == "[]" and "ultralytics" in sys.modules
