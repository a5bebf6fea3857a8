"""What taking heads out saves: timm's ViT-S with shares of its heads gone, beside the whole network.

    python -m benchmarks.pruned_heads > benchmarks/pruned_heads.md
"""
import time

import timm
import torch

import zoo
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts

NAME, GONE, SIZE = "vit_small_patch16_224", (1, 2, 3, 5), 224
HEAD = """# Taking heads out of a ViT

`python -m benchmarks.pruned_heads`: `zoo.prune_heads` on timm's {name}, the named share of the heads of every layer gone; the rival is the
whole network. Which heads go does not matter for time. MLPs, two thirds of the products, stay as they are.

{table}"""


def shares(batch: int, rounds: int) -> Report:
    torch.set_num_threads(2)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    comparisons, whole = [], timm.create_model(NAME)
    for gone in GONE:
        pruned = timm.create_model(NAME)
        heads = pruned.blocks[0].attn.num_heads
        zoo.prune_heads(pruned, {f"blocks.{i}.attn": range(gone) for i in range(len(pruned.blocks))})
        parameters = sum(p.numel() for p in pruned.parameters()) / 1e6
        for kind in PASSES:
            comparisons.append(compare(f"{gone} of {heads} heads gone, {parameters:.1f} M parameters", kind, pruned, whole, images,
                                        rounds, time.perf_counter))
    return Report(facts(batch, {NAME: f"{SIZE}x{SIZE}"}, "float32", rounds, "cpu", True), comparisons)


if __name__ == "__main__":
    print(HEAD.format(name=NAME, table=shares(batch=4, rounds=9).markdown()))
