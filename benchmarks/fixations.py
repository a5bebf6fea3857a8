"""Where a made observer looks: rings on photographs, maps of fixations around them. Writes fixations.md beside it.

    python -m benchmarks.fixations
"""
import argparse
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from skimage import data
from sklearn.datasets import load_sample_image

from zoo.checkpoints import load_trained
from zoo.measuring.fixations import measured
from zoo.measuring.model_benchmark import facts
from zoo.mm.checkpoint import best_checkpoint
from zoo.predicting.fixations import heat, look
from zoo.reading.fixations import read_map, read_points
from zoo.reading.pictures import open_picture
from zoo.tools import train
from zoo.tools._cli import run

SIZE, SEED, EPOCHS = (96, 128), 0, 14
COUNTS = {"train": 320, "val": 64}
FIXATIONS, WANDERING, BLUR = 12, 3.0, 5.0  # of a target; pixels around it that looks miss it by; pixels that maps are blurred by
PAGE = Path(__file__).with_suffix(".md")
PICTURE = PAGE.parents[1] / "docs" / "pictures" / "msinet.png"
NAMES = ("kl", "cc", "sim", "nss", "auc")
HEAD = """# Where a made observer looks

No package ships maps of where people looked, so this is a made task, and says nothing of people: `python -m benchmarks.fixations` cuts
{train} pictures of {width}×{height} out of five photographs (scikit-image's and scikit-learn's) and {val} out of three others, which are
held out whole; draws on each one or two rings, which are looked at, and two to four discs of the same colours and sizes, which are not;
draws {fixations} fixations a ring, {wandering:g} pixels around its centre, and blurs them by {blur:g} pixels, as maps of fixations are.
`zoo train msinet_nano DATA --epochs {epochs}` from random weights, seed {seed}: {minutes:.1f} minutes of one core. Means over the held-out
pictures; "centre": a Gaussian of a quarter of the sides in the middle, as is usual; "mean map": that of the training pictures.

{facts}

| map | KL ↓ | CC ↑ | SIM ↑ | NSS ↑ | AUC-Judd ↑ |
| --- | ---: | ---: | ---: | ---: | ---: |
{rows}
"""


def photographs(split: str) -> list[Image.Image]:
    found = ([data.astronaut(), data.coffee(), load_sample_image("china.jpg"), data.rocket(), data.hubble_deep_field()] if split == "train"
             else [data.chelsea(), load_sample_image("flower.jpg"), data.immunohistochemistry()])
    return [Image.fromarray(pixels) for pixels in found]


def write(root: Path, split: str) -> None:
    """Pictures, maps and fixated pixels in root/split."""
    shown, random = photographs(split), np.random.default_rng((SEED, split == "val"))
    folders = [root / split / name for name in ("images", "maps", "fixations")]
    for folder in folders:
        folder.mkdir(parents=True)
    height, width = SIZE
    for i in range(COUNTS[split]):
        photograph = shown[i % len(shown)]
        zoom = random.uniform(1, min(photograph.width / width, photograph.height / height, 3))
        side = round(width * zoom), round(height * zoom)
        left, top = (int(random.integers(whole - part + 1)) for whole, part in zip(photograph.size, side, strict=True))
        picture = photograph.crop((left, top, left + side[0], top + side[1])).resize((width, height), Image.Resampling.BOX)
        points, places, pen = np.zeros(SIZE, np.uint8), [], ImageDraw.Draw(picture)
        rings = int(random.integers(1, 3))
        for ring in [True] * rings + [False] * int(random.integers(2, 5)):
            while True:
                place = np.array([random.uniform(12, width - 12), random.uniform(12, height - 12)])
                if all(np.abs(place - other).max() > 18 for other in places):
                    break
            places.append(place)
            radius, colour = random.uniform(5, 8), tuple(int(value) for value in random.integers(256, size=3))
            box = [*(place - radius), *(place + radius)]
            pen.ellipse(box, outline=colour, width=3) if ring else pen.ellipse(box, fill=colour)
            for x, y in np.rint(random.normal(place, WANDERING, (FIXATIONS, 2))).astype(int) if ring else ():
                if 0 <= x < width and 0 <= y < height:
                    points[y, x] = 255
        density = gaussian_filter(points.astype(float), BLUR)
        for folder, pixels in zip(folders, (picture, np.rint(255 * density / density.max()).astype(np.uint8), points), strict=True):
            (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(folder / f"{i:04d}.png")


def centre() -> torch.Tensor:
    rows, columns = (np.exp(-np.square((np.arange(n) - (n - 1) / 2) / (n / 4)) / 2) for n in SIZE)
    return torch.from_numpy(np.outer(rows, columns)).float()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fixations", description=__doc__,
                                     epilog="example: python -m benchmarks.fixations")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, work_dir = Path(folder) / "rings", Path(folder) / "run"
        for split in COUNTS:
            write(root, split)
        begun = time.process_time()
        train.main(["msinet_nano", str(root), "--epochs", str(args.epochs), "--seed", str(SEED), "--work-dir", str(work_dir)])
        minutes = (time.process_time() - begun) / 60
        model, info = load_trained(cast(Path, best_checkpoint(work_dir)))
        maps = [read_map(path, path, (SIZE[1], SIZE[0])) for path in sorted((root / "train" / "maps").iterdir())]
        mean_map = torch.from_numpy(np.mean([np.asarray(each, np.float32) for each in maps], 0))
        found: dict[str, list[dict[str, float]]] = {"`msinet_nano`": [], "mean map": [], "centre": []}
        shown = []
        for path in sorted((root / "val" / "images").iterdir()):
            picture = open_picture(path)
            density = torch.from_numpy(np.array(read_map(root / "val" / "maps" / path.name, path, picture.size), np.float32))
            points = read_points(root / "val" / "fixations" / path.name, path, picture.size)
            saliency = look(model, picture, info.data_config["mean"], info.data_config["std"], info.input_size[1:])
            shown.append([picture, heat(picture, density.byte().numpy()), heat(picture, saliency)])
            for name, answer in zip(found, (torch.from_numpy(saliency).float(), mean_map, centre()), strict=True):
                found[name].append(measured(answer, density, points))
    told = facts(1, {"all": "128x96"}, "float32", 1, "cpu", False)
    rows = [f"| {name} | {' | '.join(f'{np.mean([each[key] for each in values]):.3f}' for key in NAMES)} |"
            for name, values in found.items()]
    args.page.write_text(HEAD.format(
        **COUNTS, width=SIZE[1], height=SIZE[0], fixations=FIXATIONS, wandering=WANDERING, blur=BLUR, epochs=args.epochs, seed=SEED,
        minutes=minutes, facts="\n".join(f"- {key}: {told[key]}" for key in ("date", "machine", "software")), rows="\n".join(rows)))
    print(*rows, sep="\n")
    if args.page == PAGE:
        sheet = Image.new("RGB", (3 * 2 * SIZE[1] + 16, 2 * 2 * SIZE[0] + 8), "white")
        for row, pictures in enumerate(shown[:2]):
            for column, each in enumerate(pictures):
                enlarged = each.resize((2 * SIZE[1], 2 * SIZE[0]), Image.Resampling.BICUBIC)
                sheet.paste(enlarged, (column * (2 * SIZE[1] + 8), row * (2 * SIZE[0] + 8)))
        sheet.quantize(96).save(PICTURE, optimize=True)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    run(main)
