"""Scripts of benchmarks/ that compare layers and networks run: once, on small ones."""
import numpy as np
import torch

from benchmarks import attention_removal, dual_attention, halo_timm, pruned_heads, sigma_reparam, sparsifiner, thin_structures


def test_halo_attention_beside_timms(monkeypatch):
    monkeypatch.setattr(halo_timm, "LAYERS", {"small": (16, 16, halo_timm.OURS | dict(num_heads=2))})
    report = halo_timm.layers(batch=1, rounds=1)
    assert report.markdown().count("| small |") == 2


def test_networks_without_some_heads(monkeypatch):
    monkeypatch.setattr(pruned_heads, "NAME", "vit_tiny_patch16_224")
    monkeypatch.setattr(pruned_heads, "GONE", (1,))
    report = pruned_heads.shares(batch=1, rounds=1)
    assert report.markdown().count("| 1 of 3 heads gone, ") == 2


def test_networks_without_some_attention(monkeypatch):
    monkeypatch.setattr(attention_removal, "NAMES", ["lambda_deit_tiny_024"])
    report = attention_removal.released(batch=1, rounds=1)
    assert report.markdown().count("| lambda_deit_tiny_024, 5.3 of 5.7 M parameters | ") == 2


def test_networks_with_learned_spectral_norms(monkeypatch):
    monkeypatch.setattr(sigma_reparam, "NAME", "vit_tiny_patch16_224")
    report = sigma_reparam.costs(batches=(1,), rounds=1)
    assert report.markdown().count(", batch 1 | ") == 6


def test_attention_to_few_keys(monkeypatch):
    monkeypatch.setattr(sparsifiner, "SIDES", (4,))
    report = sparsifiner.mechanisms(batch=2, rounds=1)
    assert report.markdown().count("17 tokens, 25% of keys") == 4


def test_dual_attention_beside_plain_attention_and_pairs(monkeypatch):
    monkeypatch.setattr(dual_attention, "SIDES", (4,))
    assert dual_attention.layers(batch=2, rounds=1).markdown().count(", 17 tokens") == 4


def test_thin_structures_are_drawn_alike_and_labelled_where_they_are():
    behind = [np.full((60, 70), 0.5, np.float32)]
    pictures, labels = thin_structures.batch(behind, 3, 48, np.random.default_rng(0))
    again = thin_structures.batch(behind, 3, 48, np.random.default_rng(0))
    assert torch.equal(pictures, again[0]) and torch.equal(labels, again[1])
    assert pictures.shape == (3, 1, 48, 48) and 0.01 < labels.float().mean() < 0.3
    inside, outside = pictures[:, 0][labels == 1].mean(), pictures[:, 0][labels == 0].mean()
    assert outside - inside > 0.3  # darker, as what is behind is not dark


def test_thin_structures_learn_by_every_loss_and_say_what_differs():
    behind = thin_structures.photographs(("camera",))
    pictures, labels = thin_structures.batch(behind, 2, 32, np.random.default_rng(1))
    results = {}
    for way in thin_structures.losses():
        model, seconds = thin_structures.learn(way, 0, behind, steps=3)
        results[way] = [thin_structures.measured(model, pictures, labels) | {"seconds": seconds}] * 2
        assert all(value >= 0 for value in results[way][0].values())
    assert thin_structures.table(results).count(" ± 0.0") == 12
    assert thin_structures.words(results).count("beside") == 3
