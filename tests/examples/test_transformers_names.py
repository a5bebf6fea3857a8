"""transformers' wrappers of timm's models by the names of every family."""
import pytest
import timm
import torch
from transformers import AutoBackbone, TimmBackboneConfig, TimmWrapperConfig, TimmWrapperForImageClassification

import zoo

FAMILIES = [name for name in zoo.list_models("*_nano*") if not zoo.models.is_dense(name)]
PICTURES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", FAMILIES)
def test_backbone(name):
    own = timm.create_model(name, features_only=True, out_indices=(1, 2)).eval()
    backbone = AutoBackbone.from_config(TimmBackboneConfig(backbone=name, out_indices=[1, 2])).eval()
    assert backbone.channels == own.feature_info.channels()
    backbone._backbone.load_state_dict(own.state_dict())
    with torch.no_grad():
        for found, expected in zip(backbone(PICTURES).feature_maps, own(PICTURES), strict=True):
            torch.testing.assert_close(found, expected)
    assert len(AutoBackbone.from_config(TimmBackboneConfig(backbone=name))(PICTURES).feature_maps) == 1  # the last


@pytest.mark.parametrize("name", FAMILIES)
def test_classifier(name, tmp_path):
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, num_labels=5)).eval()
    model.activation_checkpointing_enable()
    loss = model.train()(PICTURES, labels=torch.tensor([1, 2])).loss
    loss.backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval().save_pretrained(tmp_path)
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    network = timm.create_model(name, num_classes=5).eval()
    zoo.load_weights(network, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(PICTURES, output_hidden_states=True)
        torch.testing.assert_close(again(PICTURES).logits, expected.logits)
        torch.testing.assert_close(network(PICTURES), expected.logits)
    assert len(expected.hidden_states) == len(timm.create_model(name).feature_info)
