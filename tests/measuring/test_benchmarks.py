"""Scripts of benchmarks/ that compare layers and networks run: once, on small ones."""
from benchmarks import attention_removal, dual_attention, halo_timm, pruned_heads, sigma_reparam, sparsifiner


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
