"""Finer maps for segmentation: `output_stride`, as timm's ResNets have it, of every hierarchical family."""
import pytest
import timm
import torch

from zoo.layers import DeformableTokenMerging

NAMES = ["attnet_nano", "biformer_nano", "biformer_stl", "halonet_nano", "litv2_nano", "tap_fan_nano", "fan_tiny_12_p16_224",
         "das_resnet_nano", "polarized_resnet_nano", "sknet_nano", "vmamba_nano_v0"]
PICTURES = torch.randn(2, 3, 75, 100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_no_map_is_coarser(name):
    drops = name in ("biformer_stl", "vmamba_nano_v0")  # patches leave out what they do not divide
    pictures = PICTURES[..., :64, :96] if drops else PICTURES
    height, width = pictures.shape[2:]
    whole = timm.create_model(name, num_classes=5).eval()
    maps = {}
    for stride in (8, 16, 32):
        model = timm.create_model(name, num_classes=5, output_stride=stride).eval()
        model.load_state_dict(whole.state_dict())  # the same weights
        with torch.no_grad():
            last, maps[stride] = model.forward_intermediates(pictures)
            assert model(pictures).shape == (2, 5)
        reductions = [info["reduction"] for info in model.feature_info]
        assert reductions == [min(info["reduction"], stride) for info in whole.feature_info]
        assert [features.shape[1:] for features in maps[stride]] == [
            (info["num_chs"], -(-height // info["reduction"]), -(-width // info["reduction"])) for info in model.feature_info]
        assert last.shape[2:] == model.forward_features(pictures).shape[2:]
        features = timm.create_model(name, features_only=True, output_stride=stride)
        assert features.feature_info.reduction() == reductions and [m.shape for m in features(pictures)] == [m.shape for m in maps[stride]]
    with torch.no_grad():
        expected = whole.forward_intermediates(pictures, intermediates_only=True)
    for found, each in zip(maps[32], expected, strict=True):
        torch.testing.assert_close(found, each)  # it changes nothing where there is nothing to change
    for finest in range(sum(info["reduction"] <= 8 for info in whole.feature_info)):
        torch.testing.assert_close(maps[8][finest], expected[finest])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("das", "polarized", "sknet"))])
def test_other_strides_are_refused(name):
    for stride in (4, 12, 64):
        with pytest.raises(ValueError, match=f"output_stride must be 8, 16, 32 or None, got {stride}"):
            timm.create_model(name, output_stride=stride)


def test_merging_of_stride_1_has_that_of_stride_2_at_every_other_place():
    torch.manual_seed(0)
    every, other = DeformableTokenMerging(6, stride=1).eval(), DeformableTokenMerging(6).eval()
    torch.nn.init.normal_(every.offset.weight, std=0.3)
    other.load_state_dict(every.state_dict())
    x = torch.randn(2, 6, 7, 10)
    with torch.no_grad():
        assert every(x).shape == (2, 12, 7, 10)
        torch.testing.assert_close(every(x)[..., ::2, ::2], other(x))
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        DeformableTokenMerging(6, stride=3)
