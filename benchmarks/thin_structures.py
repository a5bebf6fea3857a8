"""Thin structures: a small U-Net with Dice, with clDice, and with connections of pixels and either of their losses.

    python -m benchmarks.thin_structures                # some minutes of one core; writes benchmarks/thin_structures.md

The task is drawn, so that every pixel's label is exact: trees of thin curved branches over crops of photographs in grey, brighter than
what is behind them where that is dark, and darker where it is bright. Photographs of scikit-image are behind those that are learned from,
others of scikit-image and scikit-learn behind those that are measured. What is done is kept in the work dir, and not done again.
"""
import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import zoo
from zoo.files import replacing
from zoo.measuring.model_benchmark import facts
from zoo.tools._cli import run

LEARNED_FROM = ("astronaut", "camera", "rocket", "brick", "grass", "coins")
MEASURED_ON = ("chelsea", "coffee", "flower.jpg", "china.jpg")
SEEDS, STEPS, BATCH, SIDE, RATE = (0, 1, 2), 120, 12, 48, 1e-2
HELD_OUT, HELD_OUT_SIDE = 24, 128
FINE, THINNEST, COVERED = 4, 1.5, 0.35  # pictures are drawn so many times as large; pixels; share of a pixel from which on it counts
TABLE = Path(__file__).with_suffix(".md")
HEAD = """# Thin structures

`python -m benchmarks.thin_structures`: `unet` of widths 8, 16, 32, 64, {steps} steps of {batch} drawn pictures of {side}×{side} pixels,
Adam at {rate}, one cycle; seeds {seeds}. Trees of thin branches (1.5 to 3 pixels) over crops of photographs in grey, labels exact:
learned from {learned} of scikit-image, measured on {held_out} pictures of {large}×{large} over
chelsea and coffee of scikit-image, flower and china of scikit-learn, the same for all. Mean ± deviation over seeds. clDice is of skeletons
(scikit-image's `skeletonize`); *pieces off* is by how many the number of connected components differs from the true one, mean of
pictures; *seconds* are of one core, training only.

{machine}

"""
WORDS = """
Connections did not help here. BiconNet's loss is behind Dice with cross-entropy in every seed, by less than seeds differ among themselves;
DconnNet's is not to be told from it. What helped is clDice, in every seed. Training is short, all networks are far from what they could
learn, and mistake edges of photographs for branches: that longer training, or a larger network, gives another order is not excluded.
"""


def photographs(names: tuple[str, ...]) -> list[np.ndarray]:
    """(H, W) in [0, 1]."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    pictures = [load_sample_image(name) if "." in name else getattr(skimage.data, name)() for name in names]
    return [np.asarray(Image.fromarray(picture).convert("L"), np.float32) / 255 for picture in pictures]


def branch(pen: ImageDraw.ImageDraw, place: np.ndarray, angle: float, width: float, left: float, rng: np.random.Generator) -> None:
    """A curved line that gets thinner, and its branches."""
    bend = rng.normal(0, 0.06)
    while left > 0:
        bend = 0.9 * bend + rng.normal(0, 0.03)
        angle += bend
        end = place + 2 * FINE * np.array([np.cos(angle), np.sin(angle)])
        pen.line([*place, *end], fill=255, width=round(width * FINE))
        place, left, width = end, left - 2, max(THINNEST, width * 0.985)
        if left > 12 and rng.random() < 0.09:
            branch(pen, place, angle + rng.choice([-1, 1]) * rng.uniform(0.5, 1.1), max(THINNEST, 0.75 * width), 0.6 * left, rng)


def draw(behind: list[np.ndarray], side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture (side, side), and the labels of its pixels: 1 where enough of a pixel is of a branch."""
    photograph = behind[rng.integers(len(behind))]
    top, left = (rng.integers(n - side + 1) for n in photograph.shape)
    picture = photograph[top : top + side, left : left + side].copy()
    canvas = Image.new("L", (side * FINE, side * FINE))
    for _ in range(side // 48 + 1):
        start = rng.uniform(0.1, 0.9, 2) * side * FINE
        branch(ImageDraw.Draw(canvas), start, rng.uniform(0, 2 * np.pi), rng.uniform(THINNEST, 3), rng.uniform(0.5, 1.1) * side, rng)
    covered = np.asarray(canvas, np.float32).reshape(side, FINE, side, FINE).mean((1, 3)) / 255
    contrast = rng.uniform(0.2, 0.4) * (1 if picture.mean() < 0.5 else -1)
    picture = picture + contrast * covered + rng.normal(0, 0.03, picture.shape)
    return picture.clip(0, 1).astype(np.float32), (covered > COVERED).astype(np.int64)


def batch(behind: list[np.ndarray], count: int, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    pictures, labels = zip(*(draw(behind, side, rng) for _ in range(count)), strict=True)
    return torch.from_numpy(np.stack(pictures))[:, None] * 4 - 2, torch.from_numpy(np.stack(labels))


def losses() -> dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]]:
    """Of each way to learn, whether the network puts out connections, and its loss of outputs and labels."""
    from monai.losses import DiceCELoss, SoftDiceclDiceLoss

    dice = DiceCELoss(softmax=True, to_onehot_y=True)
    with_skeletons = SoftDiceclDiceLoss(softmax=True, to_onehot_y=True, include_background=False, alpha=0.5)
    return {
        "Dice and cross-entropy": (False, lambda out, labels: dice(out, labels[:, None])),
        "the same and clDice": (False, lambda out, labels: dice(out, labels[:, None]) + with_skeletons(out, labels[:, None])),
        "connections, BiconNet's loss": (True, zoo.ConnectivityLoss("bicon")),
        "connections, DconnNet's loss": (True, zoo.ConnectivityLoss("dconn")),
    }


def learn(way: str, seed: int, behind: list[np.ndarray], steps: int = STEPS) -> tuple[nn.Module, float]:
    """The network in evaluation mode, and the seconds of this process that it took."""
    connectivity, loss = losses()[way]
    torch.manual_seed(seed)
    model = timm.create_model("unet", widths=(8, 16, 32, 64), in_chans=1, num_classes=2, connectivity=connectivity).train()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    rng, took = np.random.default_rng(seed), 0.0
    for _ in range(steps):
        pictures, labels = batch(behind, BATCH, SIDE, rng)
        start = time.process_time()
        optimizer.zero_grad()
        loss(model(pictures), labels).backward()
        optimizer.step()
        schedule.step()
        took += time.process_time() - start
    return model.eval(), took


def measured(model: nn.Module, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """Dice and clDice in per cent, and by how many pieces predictions are off, means of pictures."""
    from skimage.measure import label
    from skimage.morphology import skeletonize

    with torch.inference_mode():
        found = torch.cat([model(chunk).argmax(1) for chunk in pictures.split(8)]).bool().numpy()
    rows = []
    for ours, true in zip(found, labels.bool().numpy(), strict=True):
        thin, thin_true = skeletonize(ours), skeletonize(true)
        precision, recall = (thin & true).sum() / max(1, thin.sum()), (thin_true & ours).sum() / max(1, thin_true.sum())
        pieces = [int(np.max(label(mask, connectivity=2))) for mask in (ours, true)]
        rows.append((200 * (ours & true).sum() / (ours.sum() + true.sum()), 200 * precision * recall / max(1e-9, precision + recall),
                     abs(pieces[0] - pieces[1])))
    return dict(zip(("dice", "cldice", "pieces"), np.mean(rows, 0).tolist(), strict=True))


def table(results: dict[str, list[dict[str, float]]]) -> str:
    def cell(each_seed: list[dict[str, float]], key: str, digits: int) -> str:
        values = [found[key] for found in each_seed]
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"

    lines = ["| learned by | Dice, % | clDice, % | pieces off | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    for way, each_seed in results.items():
        lines.append(f"| {way} | {cell(each_seed, 'dice', 1)} | {cell(each_seed, 'cldice', 1)} | {cell(each_seed, 'pieces', 1)} | "
                     f"{np.mean([found['seconds'] for found in each_seed]):.0f} |")
    return "\n".join(lines)


def words(results: dict[str, list[dict[str, float]]]) -> str:
    """What the numbers say: differences to the first way, seed by seed, and whether all seeds agree."""
    first, *others = results
    lines = []
    for way in others:
        said = []
        for key, name in (("dice", "Dice"), ("cldice", "clDice"), ("pieces", "pieces off")):
            differences = [ours[key] - theirs[key] for ours, theirs in zip(results[way], results[first], strict=True)]
            agree = "in every seed" if min(differences) > 0 or max(differences) < 0 else "seeds disagree"
            said.append(f"{name} {np.mean(differences):+.1f} ({agree})")
        lines.append(f"- *{way}* beside *{first}*: {', '.join(said)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/thin_structures"), help="where results are kept")
    args = parser.parse_args()

    torch.set_num_threads(1)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    behind = photographs(LEARNED_FROM)
    pictures, labels = batch(photographs(MEASURED_ON), HELD_OUT, HELD_OUT_SIDE, np.random.default_rng(1000))
    results: dict[str, Any] = {way: [] for way in losses()}
    for seed in SEEDS:
        for number, way in enumerate(results):
            path = args.work_dir / f"{number}-{seed}.json"
            if not path.exists():
                model, seconds = learn(way, seed, behind)
                with replacing(path) as written:
                    written.write_text(json.dumps({**measured(model, pictures, labels), "seconds": seconds}))
            results[way].append(json.loads(path.read_text()))
            print(f"{way}, seed {seed}: {results[way][-1]}", flush=True)
    told = facts(BATCH, {"all": f"{SIDE}×{SIDE}"}, "float32", len(SEEDS), "cpu", False)
    told["rounds"] = f"{len(SEEDS)} seeds; seconds of the process on a machine that had other things to do"
    head = HEAD.format(
        steps=STEPS, batch=BATCH, side=SIDE, rate=RATE, seeds=", ".join(map(str, SEEDS)), held_out=HELD_OUT,
        learned=", ".join(LEARNED_FROM), large=HELD_OUT_SIDE, machine="\n".join(f"- {name}: {fact}" for name, fact in told.items()))
    with replacing(TABLE) as written:
        written.write_text(f"{head}{table(results)}\n\n{words(results)}\n{WORDS}")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    run(main)
