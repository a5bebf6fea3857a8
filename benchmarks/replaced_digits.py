"""Everything that changes the attention of a ViT, on real data under one budget; writes replaced_digits.md beside it.

    python -m benchmarks.replaced_digits
"""
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zoo
from zoo.layers.normalized_attention import NORMALIZERS
from zoo.measuring.model_benchmark import facts

SEEDS = 3
EPOCHS, FURTHER = 15, 4
HELD_OUT = 360
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Attention replaced, on digits

`python -m benchmarks.replaced_digits`: {seeds} seeds, each with its own weights and its own {held_out} of scikit-learn's 1,797
digits held out. The network is timm's ViT of width 48 with 4 blocks of 4 heads and patches of 2×2 (17 tokens). "From scratch": {epochs}
epochs of AdamW, the same for all. "Put in": into the softmax network of the same seed after these epochs; accuracy at once, and after
{further} epochs more, which softmax gets, too. Means, with the least and the greatest; the standard error of an accuracy of 94 % over
{all_held_out} digits is 0.7 points, so that differences below 2 say nothing. Time is a step's in training, against softmax in the same run.

{facts}

| attention | from scratch, % | put in, at once, % | put in, {further} epochs more, % | parameters | time |
| --- | ---: | ---: | ---: | ---: | ---: |
{rows}
"""

Way = Callable[[nn.Module], nn.Module]
WAYS: dict[str, Way] = {name: partial(zoo.replace_attention, layer=name) for name in (*NORMALIZERS, "hedgehog", "moh", "sparsifiner")}
WAYS |= {f"softmax, gate by {gate}": partial(zoo.replace_attention, layer="softmax", gate=gate) for gate in ("head", "element")}
WAYS["softmax, σReparam"] = partial(zoo.reparametrize, where="blocks.*")


def _half_of_the_heads_gone(vit: nn.Module) -> nn.Module:
    zoo.prune_heads(vit, {f"blocks.{i}.attn": (0, 1) for i in range(len(vit.blocks))})
    return vit


WAYS["softmax, attention of 2 of 4 blocks taken out"] = partial(zoo.remove_attention, blocks=(0, 2))
WAYS["softmax, 2 of 4 heads taken out"] = _half_of_the_heads_gone


class Digits:
    """Those of one seed."""

    def __init__(self, seed: int):
        self.seed, self.order = seed, torch.Generator().manual_seed(seed)
        data = load_digits()
        shuffled = torch.randperm(len(data.target), generator=self.order)
        images, labels = torch.tensor(data.images, dtype=torch.float32)[shuffled, None] / 16, torch.tensor(data.target)[shuffled]
        sizes = (len(labels) - HELD_OUT, HELD_OUT)
        (self.images, self.val_images), (self.labels, self.val_labels) = images.split(sizes), labels.split(sizes)

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=4, num_heads=4,
                                 num_classes=10, weight_init="jax")

    def fit(self, vit: nn.Module, epochs: int, lr: float = 3e-3) -> float:
        """Seconds a step."""
        vit.train()
        optimizer, batches = torch.optim.AdamW(vit.parameters(), lr), -(-len(self.labels) // 32)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
        order, seconds = torch.Generator().manual_seed(self.seed), []
        for _ in range(epochs):
            for batch in torch.randperm(len(self.labels), generator=order).split(32):
                start = time.process_time()
                optimizer.zero_grad()
                F.cross_entropy(vit(self.images[batch]), self.labels[batch]).backward()
                optimizer.step()
                schedule.step()
                seconds.append(time.process_time() - start)
        return statistics.median(seconds)

    def accuracy(self, vit: nn.Module) -> float:
        with torch.no_grad():
            return 100 * (vit.eval()(self.val_images).argmax(1) == self.val_labels).float().mean().item()


def rows() -> list[str]:
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in WAYS}
    for seed in range(SEEDS):
        digits = Digits(seed)
        trained: dict[str, Tensor] = {}
        plain = 0.0
        for name, way in WAYS.items():
            vit = way(digits.network())
            seconds = digits.fit(vit, EPOCHS)
            if not trained:  # softmax is the first
                trained, plain = vit.state_dict(), seconds
            later = digits.network()
            later.load_state_dict(trained)
            later = way(later)
            at_once = digits.accuracy(later)
            digits.fit(later, FURTHER, 1e-3)
            size = sum(parameter.numel() for parameter in vit.parameters())
            found[name].append((digits.accuracy(vit), at_once, digits.accuracy(later), size, seconds / plain))
            print(seed, name, found[name][-1], flush=True)
    lines = []
    for name, seeds in found.items():
        *accuracies, sizes, times = zip(*seeds, strict=True)
        shown = " | ".join(f"{statistics.mean(of):.1f} ({min(of):.1f} to {max(of):.1f})" for of in accuracies)
        lines.append(f"| {name} | {shown} | {sizes[0]:,.0f} | ×{statistics.median(times):.2f} |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    told = facts(32, {"all": "1x8x8"}, "float32", SEEDS, "cpu", False)
    told["rounds"] = f"{SEEDS} seeds; time of the processor, the median of all steps"
    PAGE.write_text(HEAD.format(seeds=SEEDS, held_out=HELD_OUT, all_held_out=SEEDS * HELD_OUT, epochs=EPOCHS, further=FURTHER,
                                facts="\n".join(f"- {name}: {fact}" for name, fact in told.items()), rows="\n".join(rows())))


if __name__ == "__main__":
    main()
