"""Timm models as backbones by name: the maps are the model's, and torchvision's networks take them."""
import copy
import pickle

import pytest
import timm
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN as TorchvisionsBackboneWithFPN

import zoo
from zoo.backbones import BackboneWithFPN, FeatureMaps
from zoo.errors import InputError

FAMILIES = [name for name in zoo.list_models("*_nano*") if not zoo.models.is_dense(name)]
PICTURES = torch.randn(2, 3, 75, 90, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*FAMILIES, "resnet10t", "convnext_atto"])
def test_maps_are_the_models_own(name):
    torch.manual_seed(0)
    maps = FeatureMaps(name).eval()
    torch.manual_seed(0)
    own = timm.create_model(name).eval()
    with torch.no_grad():
        found, expected = maps(PICTURES), own.forward_intermediates(PICTURES, intermediates_only=True)
    assert list(found) == [str(i) for i in range(len(found))] and list(maps.layers) == list(found)
    for key, index in maps.layers.items():
        torch.testing.assert_close(found[key], expected[index])
        assert found[key].shape[1] == maps.channels[key] == own.feature_info[index]["num_chs"]
    assert list(maps.strides.values()) == sorted(set(maps.strides.values()))
    unused = [name for name, p in maps.named_parameters() if "head" in name or name.startswith("model.fc")]
    assert not unused


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pyramid_is_torchvisions_and_can_be_copied_and_pickled(name):
    pyramid = BackboneWithFPN(name, out_channels=8).eval()
    assert isinstance(pyramid, TorchvisionsBackboneWithFPN) and pyramid.out_channels == 8
    with torch.no_grad():
        found = pyramid(PICTURES)
        for other in (copy.deepcopy(pyramid), pickle.loads(pickle.dumps(pyramid))):
            assert all(torch.equal(found[key], again) for key, again in other(PICTURES).items())
    assert list(found) == [*pyramid.body.layers, "pool"] and {features.shape[1] for features in found.values()} == {8}


def test_names_and_order():
    maps = FeatureMaps("biformer_nano", {"out": -1, "aux": 1}, in_chans=1)
    assert maps.layers == {"aux": 1, "out": 3} and maps.strides == {"aux": 8, "out": 32}
    found = maps(torch.randn(1, 1, 64, 64))
    assert [(key, tuple(value.shape[1:])) for key, value in found.items()] == [("aux", (64, 8, 8)), ("out", (192, 2, 2))]


def test_a_detector_learns_by_its_backbone():
    model = FasterRCNN(BackboneWithFPN("biformer_nano", out_channels=8), num_classes=3, min_size=64, max_size=64)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    sum(model([torch.rand(3, 64, 64)] * 2, [target] * 2).values()).backward()
    assert not [name for name, p in model.backbone.named_parameters() if p.grad is None]


@pytest.mark.parametrize(("args", "says"), [
    (("biformer_nan",), "unknown model 'biformer_nan'; did you mean biformer_nano"),
    (("attention_unet_nano",), "gives no feature maps"),
    (("biformer_nano", {"out": 4}), "has 4 feature maps, from 0 to 3"),
    (("biformer_nano", {}), "has 4 feature maps"),
])
def test_bad_arguments(args, says):
    with pytest.raises(InputError, match=says):
        FeatureMaps(*args)
