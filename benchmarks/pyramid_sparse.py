"""What pyramid sparse attention saves, and how near it comes to softmax attention without training: writes pyramid_sparse.md beside it.

    python -m benchmarks.pyramid_sparse          # some minutes
    python -m benchmarks.pyramid_sparse time     # one of its tables: time, digits
"""
import copy
import re
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zoo
from zoo.layers import NormalizedAttention, PyramidSparseAttention
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts

from .replaced_attention import Heads

PAGE = Path(__file__).with_suffix(".md")
SIDES = (64, 96, 128)  # of maps of tokens
HELD_OUT = 60  # digits
SHARES = {  # of the blocks, cumulated: levels 1, 2, 4, 8
    "topk, 5/10/10/25 %": dict(mode="topk"),
    "topk, 10/5/0/20 %": dict(mode="topk", shares=(0.1, 0.15, 0.15, 0.35)),
    "thresholdbound, 40/10/10/20 %": dict(mode="thresholdbound"),
    "everything at level 1": dict(mode="topk", shares=(1.0, 1.0, 1.0, 1.0)),
}
TEXT = {
    "time": """Random queries, keys and values of 3 heads of width 64, of one image: `zoo.layers.PyramidSparseAttention` (ours), its choice
of levels and the order along the curve included, and torch's fused `scaled_dot_product_attention` (the rival).""",
    "digits": """timm's ViT of width 48 with 2 blocks of 3 heads and patches of 2×2, trained on scikit-learn's digits enlarged to 32×32 and
then to 64×64 pixels, is asked about 60 held-out digits at 128×128: 64×64 tokens and a class token. Its attention is then replaced,
without training.
"Outputs": the difference of the logits, as a share of their norm, and how many answers stay; "read": the share of keys, after averaging.
The standard error of an accuracy of 90 % over 60 digits is 4 points.""",
}


def of_time() -> str:
    comparisons = []
    for side in SIDES:
        qkv = torch.randn(3, 1, 3, side**2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for name in list(SHARES)[:2]:
            ours = Heads(PyramidSparseAttention(3, 64, (side, side), 0, **SHARES[name]))
            for kind in PASSES if side == SIDES[0] else PASSES[:1]:
                comparisons.append(compare(f"{side}×{side} tokens, {name}", kind, ours, Heads(NormalizedAttention(3, 64)), qkv, 3,
                                           time.perf_counter))
    return Report(facts(1, {"all": "3 heads of width 64"}, "float32", 3, "cpu", True), comparisons).markdown()


def of_digits() -> str:
    data: Any = load_digits()
    order = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(data.target), generator=order)
    images, labels = torch.tensor(data.images, dtype=torch.float32)[shuffled, None] / 16, torch.tensor(data.target)[shuffled]

    def enlarged(which: Tensor, side: int) -> Tensor:
        return F.interpolate(images[which], (side, side), mode="bilinear")

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True, patch_size=2, in_chans=1, embed_dim=48, depth=2,
                            num_heads=3, num_classes=10, weight_init="jax")
    held_out = torch.arange(HELD_OUT)
    for side, epochs, lr in ((32, 6, 3e-3), (64, 1, 1e-3)):
        optimizer = torch.optim.AdamW(vit.parameters(), lr)
        batches = [batch for _ in range(epochs) for batch in (HELD_OUT + torch.randperm(len(labels) - HELD_OUT, generator=order)).split(32)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(vit(enlarged(batch, side)), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    vit.eval()

    def asked(model: nn.Module) -> Tensor:
        return torch.cat([model(enlarged(batch, 128)) for batch in held_out.split(5)])

    def accuracy(logits: Tensor) -> float:
        return (logits.argmax(1) == labels[held_out]).float().mean().item()

    lines = ["| attention | accuracy, % | answers that stay, % | logits differ by, % | read, % |", "| --- | ---: | ---: | ---: | ---: |"]
    with torch.no_grad():
        expected = asked(vit)
        lines.append(f"| softmax | {100 * accuracy(expected):.0f} | 100 | 0 | 100 |")
        for name, args in SHARES.items():
            for grid, along in (((64, 64), ""), (None, ", tokens row by row")):
                if along and name != next(iter(SHARES)):
                    continue
                model = zoo.replace_attention(copy.deepcopy(vit), "pyramid_sparse", grid=grid, **args)
                found = asked(model)
                with zoo.capture(model) as maps:
                    model(enlarged(held_out[:5], 128))
                levels = torch.cat([reported["levels"].flatten() for reported in maps.values() if "levels" in reported])
                read = torch.where(levels > 0, 1 / levels.clamp(min=1), 0).mean()
                stay = (found.argmax(1) == expected.argmax(1)).float().mean()
                lines.append(f"| {name}{along} | {100 * accuracy(found):.0f} | {100 * stay:.0f} "
                             f"| {100 * (found - expected).norm() / expected.norm():.1f} | {100 * read:.0f} |")
    return "\n".join(lines)


def main(wanted: list[str]) -> None:
    made = {name: make() for name, make in (("time", of_time), ("digits", of_digits)) if not wanted or name in wanted}
    before = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.S)) if PAGE.exists() else {}
    tables = sorted((before | made).items(), reverse=True)
    parts = [f"## {name.capitalize()}\n\n{TEXT[name]}\n\n<!-- {name} -->\n{table}\n<!-- end -->" for name, table in tables]
    head = "# Pyramid sparse attention beside softmax attention", "`python -m benchmarks.pyramid_sparse`."
    PAGE.write_text("\n\n".join([*head, *parts]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
