"""What is particular to FAN: plain networks, features, class attention."""
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.checkpoints import load_model
from zoo.exporting.onnx import export_onnx
from zoo.models.fan import UnbiasedLayerNorm2d

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
PLAIN = zoo.list_models("fan_*")


@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks_are_tap_networks_without_the_pools(name):
    manifest = json.loads((MANIFESTS / f"tap_{name}.json").read_text())
    pools = [key for key in manifest["state"] if "dilation_predictor" in key]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    counted = sum(torch.Size(manifest["state"][key]).numel() for key in pools if not key.endswith(buffers))
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == manifest["params"] - counted


@pytest.mark.parametrize("name", ["fan_tiny_12_p16_224", "fan_tiny_8_p4_hybrid"])
def test_features_are_at_four_strides(name):
    model = timm.create_model(name, features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        *_, fine, coarse = model(torch.randn(1, 3, 64, 96))
    torch.testing.assert_close(coarse, nn.functional.max_pool2d(fine, 2))


def test_without_class_attention_its_parameters_are_gone_for_good():
    model = timm.create_model("tap_fan_nano", global_pool="avg", num_classes=3)
    assert not any(name.startswith(("head.cls_token", "head.blocks")) for name in model.state_dict())
    assert not model.no_weight_decay()
    with pytest.raises(ValueError, match="cannot go back to 'token'"):
        model.reset_classifier(3, "token")


def test_class_attention_does_not_ask_where_tokens_are():
    head, x = timm.create_model("tap_fan_nano", num_classes=3).head.eval(), torch.randn(2, 96, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(head(x.flatten(2)[..., torch.randperm(15)].unflatten(2, (5, 3))), head(x))


def test_unbiased_norm():
    torch.manual_seed(0)
    norm, x = UnbiasedLayerNorm2d(6, eps=1e-3), torch.randn(2, 6, 3, 5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    variance, mean = torch.var_mean(x, 1, correction=1, keepdim=True)
    expected = (x - mean) / (variance + 1e-3).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


def test_exports_with_free_batch_and_sizes(tmp_path):
    model, info = load_model("tap_fan_nano", in_chans=1, num_classes=10, depth=1)
    result = export_onnx(model, info, tmp_path / "x.onnx", size=(64, 64))
    assert result.free_batch and result.free_size, result.reason


def test_the_map_that_class_attention_leaves():
    """In place of the pooled one, for the authors' segmentation; the classifier stays the same, also after pruning."""
    torch.manual_seed(0)
    model, x = timm.create_model("tap_fan_nano", class_attention_map=True, num_classes=3).eval(), torch.randn(2, 3, 64, 96)
    plain = timm.create_model("tap_fan_nano", num_classes=3).eval()
    plain.load_state_dict(model.state_dict())
    head = model.head
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        tokens = torch.cat([head.cls_token.expand(2, -1, -1), final.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        for block in head.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(maps[3], tokens[:, 1:].mT.unflatten(2, final.shape[2:]))
        torch.testing.assert_close(model(x), head.fc(head.norm(tokens[:, 0])))
        torch.testing.assert_close(model(x), plain(x))
        for found, expected in zip(maps[:3], plain.forward_intermediates(x, intermediates_only=True)[:3], strict=True):
            torch.testing.assert_close(found, expected)
        features = timm.create_model("tap_fan_nano", class_attention_map=True, features_only=True).eval()
        assert features.feature_info.reduction() == [4, 8, 16, 16]
        assert [y.shape[2:] for y in features(x)][2:] == [(4, 6), (4, 6)]
        model.prune_intermediate_layers([0, 3])  # what TimmBackbone does
        torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 3], intermediates_only=True)[1], maps[3])
        assert model.no_weight_decay() == {"head.cls_token"}
        model.prune_intermediate_layers([0, 2])
    assert not any(name.startswith(("head.cls_token", "head.blocks")) for name in model.state_dict())
    with pytest.raises(ValueError, match="needs global_pool='token', got 'avg'"):
        timm.create_model("tap_fan_nano", class_attention_map=True, global_pool="avg")
