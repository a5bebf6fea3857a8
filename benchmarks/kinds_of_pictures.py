"""Where a made observer looks who is told what to look for: SUM's conditions, beside networks that are not told. Writes a page beside it.

    python -m benchmarks.kinds_of_pictures
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zoo
from zoo.measuring.fixations import measured
from zoo.measuring.model_benchmark import facts
from zoo.predicting.fixations import heat
from zoo.tools._cli import run

SIDE, DIGIT, LEARNED = 64, 16, 1400  # pixels of a scene and of a digit; digits that are learned from
BATCH, STEPS, RATE, SEEDS = 16, 120, 3e-3, (0, 1, 2)
BRIGHT, DIM = (0.85, 1.0), (0.35, 0.5)
FIXATIONS, WANDERING, BLUR = 12, 2.0, 3.0  # of a digit; pixels around its centre that looks miss it by; pixels that maps are blurred by
SHOWN = 64  # held-out scenes, each of both kinds
KINDS = ("bright", "dim")
NAMES = ("kl", "cc", "sim", "nss", "auc")
NETWORKS = {"`sum_nano`, told the kind": ("sum_nano", True), "`sum_nano`, not told": ("sum_nano", False),
            "`msinet_nano`": ("msinet_nano", False)}
PAGE = Path(__file__).with_suffix(".md")
PICTURE = PAGE.parents[1] / "docs" / "pictures" / "sum.png"
HEAD = """# An observer who is told what to look for

No package ships maps of where people looked, so this is a made task, and says nothing of people. `python -m benchmarks.kinds_of_pictures`
draws scenes of {side}×{side}: two bright and two dim digits (scikit-learn's, of {digit}×{digit} pixels; {learned} to learn from, {held}
held out) on noise. In pictures of kind 0 the bright ones are looked at, in those of kind 1 the dim ones: {fixations} fixations a digit,
{wandering:g} pixels around its centre, blurred by {blur:g} pixels. Nothing in a picture tells its kind.

Every network learns {steps} batches of {batch} scenes from random weights, by `zoo.FixationLoss`, AdamW at {rate:g} with one cosine, seeds
{seeds}; "not told" is the same network, with kind 0 for all. Means over {shown} scenes of held-out digits, each as both kinds, and over the
seeds, with the lowest and highest seed; minutes of one core for one training.

{facts}

| network | parameters | minutes | KL ↓ | CC ↑ | SIM ↑ | NSS ↑ | AUC-Judd ↑ |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

With the wrong kind told, `sum_nano` reaches a CC of {wrong}.
"""


class Scenes:
    """Drawn scenes (B, 3, H, W), their kinds (B,), and densities and fixated pixels (B, 1, H, W)."""

    def __init__(self, seed: int, held_out: bool):
        digits = load_digits().images / 16
        self.digits, self.random = digits[LEARNED:] if held_out else digits[:LEARNED], np.random.default_rng((seed, held_out))

    def one(self) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """A picture, and the centres of its bright and its dim digits."""
        random = self.random
        picture, centres, taken = random.uniform(0, 0.25, (SIDE, SIDE)), [[], []], []
        for kind, levels in ((0, BRIGHT), (0, BRIGHT), (1, DIM), (1, DIM)):
            while True:
                corner = random.integers(0, SIDE - DIGIT + 1, 2)
                if all(np.abs(corner - other).max() >= DIGIT for other in taken):
                    break
            taken.append(corner)
            digit = self.digits[random.integers(len(self.digits))].repeat(DIGIT // 8, 0).repeat(DIGIT // 8, 1) * random.uniform(*levels)
            part = picture[corner[0]:corner[0] + DIGIT, corner[1]:corner[1] + DIGIT]
            np.maximum(part, digit, out=part)
            centres[kind].append(corner + (DIGIT - 1) / 2)
        return picture, centres

    def looks(self, centres: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The density, up to 1, and the fixated pixels."""
        points = np.zeros((SIDE, SIDE))
        for centre in centres:
            for y, x in np.rint(self.random.normal(centre, WANDERING, (FIXATIONS, 2))).astype(int):
                if 0 <= y < SIDE and 0 <= x < SIDE:
                    points[y, x] = 1
        density = gaussian_filter(points, BLUR)
        return density / density.max(), points

    def batch(self, size: int, both: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`both`: each scene twice, first as kind 0."""
        pictures, kinds, densities, points = [], [], [], []
        for _ in range(size):
            picture, centres = self.one()
            for kind in (0, 1) if both else (int(self.random.integers(2)),):
                density, fixated = self.looks(centres[kind])
                for values, value in zip((pictures, kinds, densities, points), (picture, kind, density, fixated), strict=True):
                    values.append(value)
        maps = [torch.from_numpy(np.stack(values)).float()[:, None] for values in (pictures, densities, points)]
        return maps[0].expand(-1, 3, -1, -1), torch.tensor(kinds), maps[1], maps[2]


def seen(name: str, pictures: Tensor) -> Tensor:
    """Pictures from 0 to 1 as the network is given them."""
    cfg = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    return (pictures - mean) / std


def trained(name: str, told: bool, seed: int, steps: int) -> tuple[nn.Module, float]:
    """The network, and minutes of the processor."""
    torch.manual_seed(seed)
    model, scenes, loss = timm.create_model(name).train(), Scenes(seed, held_out=False), zoo.FixationLoss()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    begun = time.process_time()
    for _ in range(steps):
        pictures, kinds, densities, points = scenes.batch(BATCH)
        optimizer.zero_grad()
        loss(model(seen(name, pictures), *((kinds,) if told else ())), densities, points).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model.eval(), (time.process_time() - begun) / 60


def answers(model: nn.Module, name: str, pictures: Tensor, kinds: Tensor | None) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(seen(name, part), *(() if kinds is None else (kinds[i * BATCH:(i + 1) * BATCH],)))
                          for i, part in enumerate(pictures.split(BATCH))])


def scores(maps: Tensor, densities: Tensor, points: Tensor) -> list[float]:
    found = [measured(p[0], y[0], f[0]) for p, y, f in zip(maps, densities, points, strict=True)]
    return [float(np.mean([each[name] for each in found])) for name in NAMES]


def draw(model: nn.Module, pictures: Tensor, densities: Tensor) -> None:
    """Two held-out scenes in a row each: the picture, and for either kind where the observer looked and what the network says."""
    tiles = []
    for i in (0, 2):
        picture = Image.fromarray((255 * pictures[i].clamp(0, 1)).byte().permute(1, 2, 0).numpy())
        row = [picture]
        for kind in (0, 1):
            said = answers(model, "sum_nano", pictures[i, None], torch.tensor([kind]))[0, 0]
            row += [heat(picture, (255 * values).byte().numpy()) for values in (densities[i + kind, 0], said / said.max())]
        tiles.append(row)
    size, gap = 2 * SIDE, 6
    sheet = Image.new("RGB", (5 * size + 4 * gap, 2 * size + gap), "white")
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            sheet.paste(tile.resize((size, size), Image.Resampling.BICUBIC), (x * (size + gap), y * (size + gap)))
    sheet.quantize(48).save(PICTURE, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds_of_pictures", description=__doc__,
                                     epilog="example: python -m benchmarks.kinds_of_pictures")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures, kinds, densities, points = Scenes(0, held_out=True).batch(SHOWN, both=True)
    found, wrong, counts, first = {label: [] for label in NETWORKS}, [], {}, None
    for label, (name, told) in NETWORKS.items():
        for seed in args.seeds:
            model, minutes = trained(name, told, seed, args.steps)
            found[label].append([minutes, *scores(answers(model, name, pictures, kinds if told else None), densities, points)])
            counts[label] = sum(p.numel() for p in model.parameters())
            if told:
                wrong.append(scores(answers(model, name, pictures, 1 - kinds), densities, points)[1])
                first = first or model
            print(json.dumps({"network": label, "seed": seed, "minutes, kl, cc, sim, nss, auc": found[label][-1]}), flush=True)
    rows = []
    for label, values in found.items():
        numbers = np.array(values)
        cells = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in
                 zip(numbers.mean(0)[1:], numbers.min(0)[1:], numbers.max(0)[1:], strict=True)]
        rows.append(f"| {label} | {counts[label]:,} | {numbers[:, 0].mean():.1f} | {' | '.join(cells)} |")
    told_facts = facts(BATCH, {"all": f"{SIDE}x{SIDE}"}, "float32", 1, "cpu", False)
    args.page.write_text(HEAD.format(
        side=SIDE, digit=DIGIT, learned=LEARNED, held=len(load_digits().images) - LEARNED, fixations=FIXATIONS, wandering=WANDERING,
        blur=BLUR, steps=args.steps, batch=BATCH, rate=RATE, seeds=", ".join(map(str, args.seeds)), shown=SHOWN,
        facts="\n".join(f"- {key}: {told_facts[key]}" for key in ("date", "machine", "software")), rows="\n".join(rows),
        wrong=f"{np.mean(wrong):.2f} ({min(wrong):.2f} to {max(wrong):.2f})"))
    if args.page == PAGE and first is not None:
        draw(first, pictures, densities)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    run(main)
