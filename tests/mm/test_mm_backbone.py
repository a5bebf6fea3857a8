"""Any hierarchical model as a backbone: maps, freezing, weights, learning rates."""
import subprocess
import sys

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.mm.backbone import STRIDES, TimmBackbone
from zoo.mm.optim import TimmOptimWrapperConstructor


def _is_hierarchical(model: nn.Module) -> bool:
    return {*STRIDES} <= {level["reduction"] for level in getattr(model, "feature_info", ())}


NANO = [name for name in zoo.list_models("*nano*") if _is_hierarchical(timm.create_model(name))]


@pytest.mark.parametrize("name", [*NANO, "polarized_hrnet_w18_s", "resnet10t", "mobilenetv3_small_050"])
def test_maps_are_the_models_own(name):
    torch.manual_seed(0)
    backbone = TimmBackbone(name).eval()
    x = torch.randn(2, 3, 64, 96)
    maps = backbone(x)
    assert backbone.strides == (4, 8, 16, 32)
    assert all(features.is_contiguous() for features in maps)
    assert [features.shape for features in maps] == [
        (2, width, 64 // stride, 96 // stride) for width, stride in zip(backbone.channels, backbone.strides, strict=True)]
    whole = timm.create_model(name).eval()
    whole.load_state_dict(backbone.network.state_dict(), strict=False)
    for found, expected in zip(maps, whole.forward_intermediates(x, indices=backbone.out_indices, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected)


def test_maps_that_are_asked_for():
    backbone = TimmBackbone("resnet10t", out_indices=(2, 4), out_norm=True)
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert backbone.strides == (8, 32) and [features.shape[1] for features in maps] == list(backbone.channels)
    torch.testing.assert_close(maps[0].mean(1), torch.zeros_like(maps[0].mean(1)), atol=1e-5, rtol=0)
    assert MODELS.get("TimmBackbone") is TimmBackbone


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("frozen", [1, 3])
def test_frozen_parts_stay_as_they_are(name, frozen):
    torch.manual_seed(0)
    backbone = TimmBackbone(name, frozen_stages=frozen, args={"drop_path_rate": 0.5}).train()
    before = {key: value.clone() for key, value in backbone.network.state_dict().items()}
    optimizer = torch.optim.SGD([value for value in backbone.parameters() if value.requires_grad], lr=1.0)
    sum(features.square().mean() for features in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {key for key, value in backbone.network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    parts = [{"stem", "conv1", "bn1"}, {"stages.0", "layer1"}, {"stages.1", "layer2"}]
    frozen_names = tuple(f"{part}." for names in parts[:frozen] for part in names)
    assert not [key for key in changed if key.startswith(frozen_names)]
    assert [key for key in before if key.startswith(frozen_names)]


def test_frozen_batch_norms_stay_so_when_they_are_synchronised():
    backbone = TimmBackbone("resnet10t", frozen_stages=2)
    backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone).train()
    norms = {name: module for name, module in backbone.network.named_modules() if isinstance(module, nn.SyncBatchNorm)}
    assert norms["bn1"].training is False and norms["layer1.0.bn1"].training is False and norms["layer2.0.bn1"].training


def test_batch_norms_in_evaluation():
    backbone = TimmBackbone("resnet10t", norm_eval=True).train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(module.training for module in norms) and backbone.network.training
    before = norms[0].running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(norms[0].running_mean, before)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = TimmBackbone("biformer_nano", grad_checkpointing=recompute).train()
        sum(features.sin().sum() for features in backbone(torch.randn(1, 3, 64, 64))).backward()
        gradients.append(backbone.network.stem.conv1.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "epoch": 3}, lambda state: {"state_dict": state}])
@pytest.mark.parametrize("name", ["biformer_nano", "resnet10t"])
def test_weights_of_a_classifier(name, wrap, tmp_path):
    source = timm.create_model(name)
    torch.save(wrap(source.state_dict()), tmp_path / "classifier.pth")
    backbone = TimmBackbone(name, checkpoint=str(tmp_path / "classifier.pth"))
    backbone.init_weights()
    for key, value in backbone.network.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_weights_of_our_own_training(tmp_path):
    source = timm.create_model("biformer_nano", num_classes=10)
    torch.save({"state_dict": {f"model.{key}": value for key, value in source.state_dict().items()},
                "zoo": {"task": "classification", "model": "biformer_nano", "classes": list("0123456789")}}, tmp_path / "own.pth")
    backbone = TimmBackbone("biformer_nano", checkpoint=str(tmp_path / "own.pth"))
    backbone.init_weights()
    assert torch.equal(backbone.network.stem.conv1.weight, source.stem.conv1.weight)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "biformer_nan"}, "did you mean biformer_nano"),
    ({"name": "biformer_nano", "args": {"dephts": 1}}, "dephts"),
    ({"name": "biformer_nano", "out_indices": (1, 7)}, "has 4 feature maps"),
    ({"name": "biformer_nano", "frozen_stages": 9}, "has 5 parts"),
    ({"name": "biformer_nano", "checkpoint": "nowhere.pth"}, "no checkpoint nowhere.pth"),
])
def test_what_cannot_be_a_backbone(arguments, message):
    with pytest.raises(InputError, match=message):
        TimmBackbone(**arguments).init_weights()


@pytest.mark.parametrize("name", ["attnet_nano", "test_resnet"])
def test_the_authors_evaluated_weights_unless_the_average_is_asked_for(tmp_path, name):
    raw = timm.create_model(name).state_dict()
    torch.save({"model_ema": {key: value * 2 for key, value in raw.items()}, "model": raw}, tmp_path / "x.pth")
    for factor, options in ((1, {}), (2, {"ema": True})):
        backbone = TimmBackbone(name, checkpoint=str(tmp_path / "x.pth"), **options)
        backbone.init_weights()
        assert all(torch.equal(value, raw[key] * factor) for key, value in backbone.network.state_dict().items())


@pytest.mark.parametrize("name", ["biformer_nano", "resnet18", "test_resnet"])
def test_a_checkpoint_of_something_else(name, tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=f"not a checkpoint of {name}"):
        TimmBackbone(name, checkpoint=str(tmp_path / "other.pth")).init_weights()


class Detector(nn.Module):
    """A backbone with a head behind."""

    def __init__(self, name: str):
        super().__init__()
        self.backbone = TimmBackbone(name, out_norm=True)
        self.head = nn.Conv2d(self.backbone.channels[-1], 4, 1)


@pytest.mark.parametrize("name", NANO)
def test_learning_rates_fall_towards_the_stem(name):
    """Every parameter once; the rest of the detector learns at the full rate, the backbone's layers at ever smaller ones."""
    model = Detector(name)
    wrapper = Config({"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}}).to_dict()
    built = TimmOptimWrapperConstructor(wrapper, {"layer_decay": 0.5})(model)
    names = {parameter: key for key, parameter in model.named_parameters()}
    groups = {names[parameter]: group for group in built.optimizer.param_groups for parameter in group["params"]}
    assert groups.keys() == set(names.values())
    assert groups["head.weight"]["lr"] == 1.0 and groups["head.weight"]["weight_decay"] == 0.1
    assert groups["head.bias"]["weight_decay"] == 0.0 and groups["backbone.norms.0.weight"]["lr"] == 1.0
    rates = {key.removeprefix("backbone.network."): group["lr"] for key, group in groups.items() if ".network." in key}
    assert max(rates.values()) == 0.5
    stages = [max(rate for key, rate in rates.items() if key.startswith((f"stages.{i}.", f"layer{i + 1}."))) for i in range(3)]
    stem = max(rate for key, rate in rates.items() if key.startswith(("stem.", "conv1.")))
    assert stem < stages[0] < stages[1] < stages[2]


@pytest.mark.parametrize("name", NANO)
def test_maps_do_not_depend_on_padding(name):
    """Of a picture in a batch with a larger one, as the toolboxes pad, the maps are those of the picture alone."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, out_norm=True, own_size=True).eval()
    picture, larger = torch.randn(3, 57, 80), torch.randn(3, 96, 96)
    padded = torch.zeros(3, 96, 96)
    padded[:, :57, :80] = picture
    with torch.inference_mode():
        alone, together = backbone(picture[None]), backbone(torch.stack([padded, larger]))
        backbone.own_size = False
        direct = backbone(larger[None])
    for own, both, whole in zip(alone, together, direct, strict=True):
        height, width = own.shape[2:]
        torch.testing.assert_close(both[:1, :, :height, :width], own)
        assert not both[0, :, height:].any() and not both[0, :, :, width:].any()
        torch.testing.assert_close(both[1:], whole)


@pytest.mark.parametrize(("name", "unchanged"), [("resnet10t", 24), ("biformer_nano", 0)])
def test_otherwise_convolutions_see_padding_at_the_border_and_regions_everywhere(name, unchanged):
    torch.manual_seed(0)
    backbone = TimmBackbone(name, out_indices=(1,) if name == "resnet10t" else (0,)).eval()
    picture = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        (alone,), (padded,) = backbone(picture), backbone(nn.functional.pad(picture, (0, 64, 0, 64)))
    differs = ~torch.isclose(padded[..., :32, :32], alone, atol=1e-4, rtol=1e-4).all(1)[0]
    assert not differs[:unchanged, :unchanged].any() and differs[unchanged:, unchanged:].any()
    assert differs[:8, :8].any() == (unchanged == 0)


def test_memory_of_a_detectors_picture():
    """An 800×1333 picture goes through each of these backbones on the CPU in 8 GiB, the program itself included."""
    code = """
import resource, torch
from zoo.mm.backbone import TimmBackbone
for name in ("biformer_tiny", "litv2_s", "halonet_h0_256"):
    with torch.inference_mode():
        maps = TimmBackbone(name).eval()(torch.randn(1, 3, 800, 1333))
    print(*(-(-n // s) == m for f, s in zip(maps, (4, 8, 16, 32)) for n, m in zip((800, 1333), f.shape[2:])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    *fits, peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert fits == [" ".join(["True"] * 8)] * 3
    assert float(peak) < 8


def test_without_the_toolboxes(tmp_path):
    """Everything else works, and asking for them says which command installs them."""
    code = f"""
import sys
for name in ("mmcv", "mmdet", "mmseg"):
    sys.modules[name] = None
import mmengine.config.config as engine, torch, zoo.mm
engine.is_installed = lambda package: False
from zoo.mm.config import load_config
from zoo.mm.downstream import load_scene_model
load_config("biformer_nano_digits")
torch.save({{"zoo": {{"task": "mmseg"}}}}, {str(tmp_path / "a.pth")!r})
for ask in (lambda: load_config("upernet_biformer-nano_digits"), lambda: load_config("mask-rcnn_biformer-small_fpn_1x_coco"),
            lambda: load_scene_model({str(tmp_path / "a.pth")!r})):
    try:
        ask()
    except zoo.errors.InputError as error:
        print(error)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 3 and all("zoo install-mm (which is: pip install " in line for line in lines)
    assert "needs mmsegmentation" in lines[0] and "needs mmdetection" in lines[1] and "needs mmsegmentation" in lines[2]
