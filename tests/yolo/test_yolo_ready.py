"""Ready model files: every mechanism in yolo11 and yolo26, for every task, and counted right."""
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from ultralytics import YOLO
from ultralytics.nn import tasks

import zoo.yolo
from zoo.errors import InputError
from zoo.layers import ATConv, AttentionGate, DeformableTokenMerging, PolarizedSelfAttention

SIZED = [re.sub(r"^(yolo\d+)", r"\1n", name) for name in zoo.yolo.names()] + ["yolo11n-biformer_nano.yaml"]


def test_there_is_one_for_every_mechanism_that_has_a_layer_for_maps():
    assert {name.removesuffix(".yaml") for name in zoo.yolo.names()} == {
        f"{base}-{mechanism}" for base in ("yolo11", "yolo26")
        for mechanism in {*zoo.MECHANISMS, "dtm"} - {
            "a2n", "connectivity", "dual", "holistic", "inspyrenet", "moh", "msinet", "parts", "removal", "ss2d",
            "sum"}}


@pytest.mark.parametrize("name", SIZED)
def test_it_runs_learns_and_is_counted_right(name):
    model = YOLO(name, verbose=False)
    network = model.model.train()
    outputs = network(torch.rand(2, 3, 64, 64))
    total = sum(leaf.float().square().mean() for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor))
    total.backward()
    assert [key for key, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, 96, 160))
    _, parameters, _, gflops = model.info(imgsz=[96, 160])
    assert gflops == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-6) and gflops > 0
    assert parameters == sum(p.numel() for p in network.parameters())
    assert network.model[-1].stride.tolist() == [8, 16, 32] and network.model[-1].stride.device.type == "cpu"


def test_counting_at_640_sees_the_products_that_ultralytics_counter_does_not():
    """Attention between all positions grows with the square of their number, which no count on a small image tells."""
    model = YOLO("yolo11n-biformer_nano.yaml", verbose=False)
    small, large = (model.info(imgsz=size)[3] for size in (320, 640))
    assert large > 4.05 * small
    plain = YOLO("yolo11n.yaml", verbose=False)
    small, large = (plain.info(imgsz=size)[3] for size in (320, 640))
    assert large == pytest.approx(6.5, abs=0.1)


def test_mechanisms_are_at_their_places():
    rows = {name: YOLO(f"yolo26n-{name}.yaml", verbose=False).model.model for name in ("polarized", "dtm", "gates", "atconv")}
    assert isinstance(rows["polarized"][10].layer, PolarizedSelfAttention)  # of C2PSA
    assert [isinstance(rows["dtm"][i].layer, DeformableTokenMerging) for i in (5, 7)] == [True, True]
    gates = [module for module in rows["gates"].modules() if isinstance(module, AttentionGate)]
    assert [gate.dim for gate in gates] == [128, 128]
    followed = {path.split(".")[0] for path, module in rows["atconv"].named_modules() if isinstance(module, ATConv)}
    assert followed == {"6", "8"}


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
@pytest.mark.parametrize("mechanism", ["das", "biformer_nano"])
def test_every_task(mechanism, task):
    suffix = {"segment": "seg", "classify": "cls"}.get(task, task)
    model = YOLO(f"yolo11n-{mechanism}-{suffix}.yaml", verbose=False)
    assert model.task == task and type(model.model.model[-1]).__name__.lower().startswith(task[:3])
    model.model.eval()(torch.rand(1, 3, 64, 64))


def test_sizes_scale_the_layers():
    widths = [next(module for module in YOLO(f"yolo11{size}-polarized.yaml", verbose=False).model.modules()
                   if isinstance(module, PolarizedSelfAttention)).dim for size in "nsx"]
    assert widths == [256, 512, 768]


def test_weights_of_the_plain_model_fit_and_give_what_they_gave():
    """Rows keep their numbers, so that a trained yolo11n goes on as yolo11n-das."""
    plain, model = (YOLO(name, verbose=False).model.eval() for name in ("yolo11n.yaml", "yolo11n-das.yaml"))
    model.load(plain, verbose=False)
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(image)[0], plain(image)[0])


def test_a_ready_file_written_out_is_the_same_model(tmp_path):
    whole = zoo.yolo.model_file("yolo11n-gates.yaml")
    file = tmp_path / "yolo11n-mine.yaml"
    file.write_text(yaml.safe_dump(whole, sort_keys=False))
    mine, ready = (YOLO(name, verbose=False).model.state_dict() for name in (file, "yolo11n-gates.yaml"))
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in ready.items()}
    assert all(isinstance(row, list) for row in whole["backbone"] + whole["head"])


def test_what_is_not_ready_is_said():
    with pytest.raises(InputError, match="ready model files are yolo11-atconv.yaml"):
        zoo.yolo.model_file("yolo8n.yaml")
    with pytest.raises(InputError, match="gates has its place in the neck"):
        YOLO("yolo11n-gates-cls.yaml")
    with pytest.raises(FileNotFoundError):
        YOLO("yolo11n-dsa.yaml")


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"nc": 3, "backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [[-1, 1, "Classify", ["nc"]]]}
    (tmp_path / "yolo11n-das.yaml").write_text(yaml.safe_dump(own))
    assert tasks.yaml_model_load("yolo11n-das.yaml")["nc"] == 3


def test_the_table_of_a_model_names_layers_and_widths(monkeypatch):
    said = []
    monkeypatch.setattr(tasks, "LOGGER", SimpleNamespace(info=said.append, warning=said.append))
    zoo_rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "DAS", {"ratio": 0.5}], [-1, 1, "DeformableTokenMerging", [32]]]
    tasks.parse_model({"nc": 3, "backbone": zoo_rows, "head": [[-1, 1, "Classify", ["nc"]]]}, 3)
    das, merging = (next(line for line in said if name in line) for name in ("zoo.layers.DAS", "zoo.layers.DeformableTokenMerging"))
    assert "[16, {'ratio': 0.5}]" in das and "[16, 32, {}]" in merging


BACKBONES = [name for name in zoo.list_models("*_nano*") if not zoo.models.is_dense(name)]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_network_is_a_backbone_or_says_why_not(name):
    if getattr(zoo.MECHANISMS.get(zoo.mechanism_of(name)), "HIERARCHICAL", True):
        network = YOLO(f"yolo11n-{name}.yaml", verbose=False).model.eval()
        assert network.stride.tolist() == [8, 16, 32] and network.model[0].strides == [4, 8, 16, 32]
    else:
        with pytest.raises(InputError, match="one of 1 maps"):
            YOLO(f"yolo11n-{name}.yaml", verbose=False)
