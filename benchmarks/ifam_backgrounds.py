"""iFAM on digits over photographs that go with the class in training, and are swapped in the test. Writes ifam_backgrounds.md beside it.

    python -m benchmarks.ifam_backgrounds

What is done is kept in work_dirs/ifam_backgrounds.json, and not done again.
"""
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.functional import resize

import zoo
from zoo.files import replacing
from zoo.measuring.model_benchmark import facts
from zoo.models.any_size import AnySizeVisionTransformer
from zoo.modules import evaluating
from zoo.reading.digits import Digits

SEEDS, EPOCHS, BATCH, RATE = 3, 20, 64, 2e-3
SIDE, DIGIT, OFF, OFTEN = 24, 16, 1, 0.95  # pixels of an image, of a digit and off the middle; share of images on their class' photograph
PATCH, WHITE = 4, 1.5  # pixels of a patch's side; above which, normalised, all colours are those of a digit
WAYS = {"masked": "hard", "not masked": "none"}
WEIGHTS = dict(total_variation=0.1, entropy=0.1, equivariance=0.0)
DONE, PAGE = Path("work_dirs/ifam_backgrounds.json"), Path(__file__).with_suffix(".md")

HEAD = """# Digits over photographs that change sides

`python -m benchmarks.ifam_backgrounds`: TEXT

{facts}

| stage 2 | right, same photographs, % | right, swapped, % | stage 1 alone, swapped, % | digits seen, % | ground seen, % | seconds |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}
"""


class Seeing(zoo.ifam.TwoStageVisionTransformer):
    """Without a mask: stage 2 sees all patches."""

    def _stage_2(self, x, parts, *args):
        return super()._stage_2(x, parts._replace(mask=torch.ones_like(parts.mask)), *args)


def network(mask: str) -> zoo.ifam.TwoStageVisionTransformer:
    size = dict(img_size=SIDE, patch_size=PATCH, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    stages = (AnySizeVisionTransformer(**size) for _ in range(2))
    kind = Seeing if mask == "none" else zoo.ifam.TwoStageVisionTransformer
    return kind(*stages, num_classes=10, num_parts=4, mask="hard" if mask == "none" else mask)


def photographs() -> list[Tensor]:
    """Two, (3, H, W) from 0 to 0.6, so that white digits stand out."""
    return [resize(torch.tensor(image).permute(2, 0, 1) / 255 * 0.6, [142, 213], antialias=True) for image in load_sample_images().images]


class Composed:
    """Digits near the middle of random pieces of photographs: for training of the left 60 % of each, in the test of the rest."""

    def __init__(self, split: str, photos: list[Tensor]):
        digits = Digits(split, DIGIT)
        self.ink = torch.stack([torch.from_numpy(np.array(image)) / 255 for image in digits.images])
        self.labels = torch.tensor(digits.targets)
        cut = round(0.6 * photos[0].shape[2])
        self.photos = [photo[:, :, :cut] if split == "train" else photo[:, :, cut:] for photo in photos]

    def draw(self, which: Tensor, photo: Tensor, generator: torch.Generator) -> Tensor:
        """Images of the digits `which`, each over the photograph given for it."""
        made = []
        for index, number in zip(which.tolist(), photo.tolist(), strict=True):
            ground = self.photos[number]
            top, left = (int(torch.randint(n - SIDE, (), generator=generator)) for n in ground.shape[1:])
            down, right = ((SIDE - DIGIT) // 2 - OFF + torch.randint(2 * OFF + 1, (2,), generator=generator)).tolist()
            ink = F.pad(self.ink[index], (right, SIDE - DIGIT - right, down, SIDE - DIGIT - down))
            made.append(torch.lerp(ground[:, top : top + SIDE, left : left + SIDE], torch.ones(()), ink))
        return (torch.stack(made) - 0.4) / 0.3

    def home(self, which: Tensor) -> Tensor:
        """The photograph of each digit's class: of 0 to 4 the first, of 5 to 9 the second."""
        return (self.labels[which] > 4).long()


def answer(way: str, seed: int) -> dict[str, float]:
    began = time.process_time()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    photos = photographs()
    train, test = Composed("train", photos), Composed("val", photos)
    model, discovery = network(WAYS[way]), zoo.PartDiscoveryLoss(WEIGHTS)
    steps = EPOCHS * (len(train.labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in range(steps):
        if step % (steps // EPOCHS) == 0:
            order = torch.randperm(len(train.labels), generator=generator)
        which = order[step % (steps // EPOCHS) * BATCH :][:BATCH]
        photo = (train.home(which) + (torch.rand(BATCH, generator=generator) > OFTEN)) % 2
        _, loss, terms = discovery(model, train.draw(which, photo, generator), train.labels[which])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(way, seed, step, {name: round(term.item(), 2) for name, term in terms.items()}, flush=True)
    which, found = torch.arange(len(test.labels)), {}
    with evaluating(model), torch.no_grad():
        for name, swapped in (("same", 0), ("swapped", 1)):
            images = test.draw(which, (test.home(which) + swapped) % 2, torch.Generator().manual_seed(100))
            parts, of_parts = model.discover(images)
            of_digit = F.max_pool2d((images.amin(1) > WHITE).float(), PATCH) > 0
            found |= {name: _share(model(images).argmax(1) == test.labels), f"{name}, stage 1": _share(of_parts.argmax(1) == test.labels),
                      f"{name}, digit": _share(parts.mask[of_digit]), f"{name}, ground": _share(parts.mask[~of_digit])}
    return found | {"seconds": time.process_time() - began}


def _share(found: Tensor) -> float:
    return 100 * found.float().mean().item()


def results() -> dict[str, list[dict[str, float]]]:
    """By way, one for every seed; those that are done are read."""
    done = json.loads(DONE.read_text()) if DONE.exists() else {}
    DONE.parent.mkdir(exist_ok=True)
    for seed in range(SEEDS):
        for way in WAYS:
            if f"{way} {seed}" not in done:
                done[f"{way} {seed}"] = answer(way, seed)
                with replacing(DONE) as written:
                    written.write_text(json.dumps(done, indent=1))
                print(way, seed, done[f"{way} {seed}"], flush=True)
    return {way: [done[f"{way} {seed}"] for seed in range(SEEDS)] for way in WAYS}


def main() -> None:
    torch.set_num_threads(1)
    found, lines = results(), []
    for way, runs in found.items():
        cells = [[run[name] for run in runs] for name in ("same", "swapped", "swapped, stage 1", "swapped, digit", "swapped, ground")]
        shown = " | ".join(f"{statistics.mean(of):.1f} ({min(of):.1f} to {max(of):.1f})" for of in cells)
        lines.append(f"| {way} | {shown} | {statistics.median(run['seconds'] for run in runs):.0f} |")
    told = facts(1, {"all": f"{SIDE}x{SIDE}"}, "float32", SEEDS, "cpu", False)
    told["rounds"] = f"{SEEDS} seeds; seconds are the processor's, of one core, on a machine that had other things to do"
    PAGE.write_text(HEAD.format(
        epochs=EPOCHS, side=SIDE, digit=DIGIT, often=round(100 * OFTEN), seeds=SEEDS, weights=", ".join(
            f"`{name}` {weight:g}" for name, weight in WEIGHTS.items()), rate=RATE,
        facts="\n".join(f"- {name}: {fact}" for name, fact in told.items()), rows="\n".join(lines)))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
