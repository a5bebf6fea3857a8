"""Halo attention beside timm's `HaloAttn`: `build` is the rival of `zoo benchmark`; run as a module this compares layers.

    python -m benchmarks.halo_timm
"""
import time

import timm
import torch
from torch import nn

import zoo  # noqa: F401  registers the models
from zoo.layers import HaloAttention
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts

from .kernel_rivals import timm_halo

# Every halo attention of timm's halonet26t at 256×256: channels, side of the map, options. Then the stages of halonet_h0_256.
TIMM, OURS = dict(block_size=8, halo_size=2), dict(block_size=8, halo_size=3)
LAYERS = {
    "halonet26t, stage 3": (256, 16, TIMM),
    "halonet26t, stage 4, strided": (512, 16, TIMM | dict(stride=2)),
    "halonet26t, stage 4": (512, 8, TIMM),
    "H0, stage 1": (64, 64, OURS | dict(num_heads=4)),
    "H0, stage 2, strided": (128, 64, OURS | dict(stride=2)),
    "H0, stage 2": (128, 32, OURS),
    "H0, stage 3": (256, 16, OURS),
    "H0, stage 4": (512, 8, OURS),
}


def build(name: str) -> nn.Module:
    """The network `name` of the zoo with timm's layer, for sizes that its blocks divide."""
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(getattr(module, "attn", None), HaloAttention):
            module.attn = timm_halo(module.attn)
    return model


def layers(batch: int, rounds: int, threads: int = 2) -> Report:
    torch.set_num_threads(threads)
    comparisons = []
    for name, (dim, side, options) in LAYERS.items():
        ours = HaloAttention(dim, **options)
        x = torch.randn(batch, dim, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for kind in PASSES:
            comparisons.append(compare(name, kind, ours, timm_halo(ours), x, rounds, time.perf_counter))
    return Report(facts(batch, {name: f"{dim}x{side}x{side}" for name, (dim, side, _) in LAYERS.items()}, "float32", rounds, "cpu", True),
                  comparisons)


if __name__ == "__main__":
    print(layers(batch=32, rounds=9).markdown())
