"""What the attention that is gone saves: the released λ-ViTs beside timm's whole DeiTs.

    python -m benchmarks.attention_removal > benchmarks/attention_removal.md
"""
import time

import timm
import torch

import zoo
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts

SIZE, NAMES = 224, [name for name in zoo.list_models(mechanism="removal") if "nano" not in name]
HEAD = """# DeiT without some of its attention

`python -m benchmarks.attention_removal`: the networks of [arXiv 2404.05657](https://arxiv.org/abs/2404.05657), from whose named blocks
attention is gone; the rival is timm's whole DeiT of the size. MLPs, two thirds of the products, stay as they are.

{table}"""


def released(batch: int, rounds: int) -> Report:
    torch.set_num_threads(2)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    comparisons = []
    for name in NAMES:
        size = name.split("_")[2]
        ours, whole = timm.create_model(name), timm.create_model(f"deit_{size}_patch16_224")
        parameters, all_ = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (ours, whole))
        for kind in PASSES:
            comparisons.append(compare(f"{name}, {parameters:.1f} of {all_:.1f} M parameters", kind, ours, whole, images, rounds,
                                        time.perf_counter))
    return Report(facts(batch, {"DeiT": f"{SIZE}x{SIZE}"}, "float32", rounds, "cpu", True), comparisons)


if __name__ == "__main__":
    print(HEAD.format(table=released(batch=2, rounds=7).markdown()))
