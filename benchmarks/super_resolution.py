"""Photographs made twice as large by a small network that some minutes of a CPU have trained, beside interpolation; time and memory.

    python -m benchmarks.super_resolution > benchmarks/super_resolution.md
"""
import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo, load_trained
from zoo.layers import ChannelSpatialAttention
from zoo.measuring.model_benchmark import PASSES, Comparison, Report, compare, facts
from zoo.measuring.restoration import measured
from zoo.mm import train
from zoo.mm.config import load_config
from zoo.predicting.restoration import restore
from zoo.reading.photographs import PHOTOGRAPHS, photographs
from zoo.reading.shrinking import cut, enlarge, shrink

CONFIG, SCALE, SEED = "a2n_nano_x2_photographs", 2, 0
HEAD = """# Super-resolution

`python -m benchmarks.super_resolution`: `zoo train {config}`, on the seven photographs of scikit-image and scikit-learn
that are not held out, from random weights, seed {seed}, {steps} steps of {batch} squares of {side} pixels, {minutes:.1f} minutes of
processor time on one thread.
Astronaut, chelsea and coffee are held out whole; the checkpoint is the last one. The rate is a second
choice: a shorter run at twice as much, 0.002, ended at 31.57 dB, bilinear interpolation's place, on them. They are made
twice smaller and enlarged again. Luminance in decibels (PSNR) and structural similarity (SSIM), two pixels cut at every border; the
protocol gives bicubic interpolation the numbers that it has in the authors' (tests/measuring/test_restoration_measures.py). One seed.

{quality}

Time and memory, of shared cores. *tiles*: `a2n_nano_x2` on a picture of 512×512, in tiles of 256 (ours) and whole (rival). *layout*:
`a2n_x2` on 96×96, channels last inside (ours) and as the authors' code lays maps out (rival), the same numbers. *attention over
channels and positions*: HAN's, 64 channels of 96×96, as two-dimensional convolutions (ours) and as the authors' one in three dimensions
(rival), the same numbers.

{table}

A picture in tiles differs from the same picture seen whole, as the blocks of A2N weigh their branches by means over what they see:
{difference}.
"""
Enlarging = Callable[[Tensor], Tensor]


def lanczos(pixels: Tensor) -> Tensor:
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    larger = picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(larger)).permute(2, 0, 1)


def quality(ways: dict[str, Enlarging]) -> tuple[str, dict[str, Tensor]]:
    """A Markdown table; and what the last of the held-out pictures became."""
    pictures = {name: cut(pixels, SCALE) for name, pixels in photographs("val").items()}
    names = list(pictures)
    lines = [f"| enlarged by | {' | '.join(f'{name}: PSNR, SSIM' for name in names)} | mean PSNR | mean PSNR, RGB | seconds a picture |",
             f"| --- | {' | '.join('---:' for _ in names)} | ---: | ---: | ---: |"]
    last = {}
    for way, enlarged in ways.items():
        found, seconds = [], []
        for true in pictures.values():
            begin = time.perf_counter()
            last[way] = enlarged(shrink(true, SCALE))
            seconds.append(time.perf_counter() - begin)
            found.append(measured(last[way], true, SCALE))
        means = [sum(row[kind] for row in found) / len(found) for kind in ("psnr", "psnr_rgb")]
        each = " | ".join(f"{row['psnr']:.2f}, {row['ssim']:.4f}" for row in found)
        lines.append(f"| {way} | {each} | {means[0]:.2f} | {means[1]:.2f} | {sum(seconds) / len(seconds):.2f} |")
    return "\n".join(lines), last


class Whole(nn.Module):
    """Restores pixels, in tiles of this size."""

    def __init__(self, model: nn.Module, info: ModelInfo, tile: int):
        super().__init__()
        self.model, self.info, self.tile = model, info, tile

    def forward(self, pixels: Tensor) -> Tensor:
        return restore(self.model, self.info, pixels[0].byte(), window=(self.tile, self.tile)).float()


class AsTheirs(nn.Module):
    """The network with its maps as the authors' code lays them out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with mock.patch("zoo.models.a2n.channels_last", lambda x: x):
            return self.model(x)


class InThree(ChannelSpatialAttention):
    """With the convolution in three dimensions."""

    def gate(self, x: Tensor) -> Tensor:
        return nn.functional.conv3d(x[:, None], self.conv.weight[None], self.conv.bias, padding=1)[:, 0].sigmoid()


def costs(model: nn.Module, info: ModelInfo, rounds: int) -> list[Comparison]:
    random = torch.Generator().manual_seed(SEED)
    picture = torch.randint(256, (1, 3, 512, 512), generator=random).float()
    comparisons = [compare("tiles", PASSES[0], Whole(model, info, 256), Whole(model, info, 1024), picture, rounds, time.perf_counter)]
    a2n = timm.create_model("a2n_x2")
    for kind in PASSES:
        crop = 255 * torch.rand(1, 3, 96, 96, generator=random)
        comparisons.append(compare("layout", kind, a2n, AsTheirs(a2n), crop, rounds, time.perf_counter))
    ours, theirs = ChannelSpatialAttention(64), InThree(64)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(1, 64, 96, 96, generator=random)
    torch.testing.assert_close(ours.gate(maps), theirs.gate(maps), atol=1e-5, rtol=1e-5)
    return comparisons + [compare("attention over channels and positions", kind, ours, theirs, maps, rounds, time.perf_counter)
                          for kind in PASSES]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.super_resolution", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/super_resolution"))
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loader, begin = load_config(CONFIG).train_dataloader, time.process_time()
    steps = args.epochs * (len(PHOTOGRAPHS["train"]) * loader.dataset.crops // loader.batch_size)
    with contextlib.redirect_stdout(sys.stderr):
        work_dir, _ = train(CONFIG, work_dir=args.work_dir, seed=SEED, cfg_options=[
            f"{place}={args.epochs}" for place in ("train_cfg.max_epochs", "train_cfg.val_interval",
                                                   "default_hooks.checkpoint.interval")])
    minutes = (time.process_time() - begin) / 60
    model, info = load_trained(work_dir / f"epoch_{args.epochs}.pth")
    table, last = quality({
        "Lanczos (Pillow)": lanczos, "bicubic": lambda x: enlarge(x, SCALE), "`a2n_nano_x2`": lambda x: restore(model, info, x),
        "`a2n_nano_x2`, tiles of 96": lambda x: restore(model, info, x, window=(96, 96)),
        "`a2n_nano_x2`, self-ensemble": lambda x: restore(model, info, x, ensemble=True)})
    one, other = (last[way].float() for way in ("`a2n_nano_x2`", "`a2n_nano_x2`, tiles of 96"))
    report = Report(facts(1, {"pictures": "as said above"}, "float32", 3, "cpu", True),
                    costs(model, info, rounds=3))
    print(HEAD.format(config=CONFIG, seed=SEED, side=SCALE * loader.dataset.crop, steps=steps,
                      batch=loader.batch_size, minutes=minutes, quality=table, table=report.markdown(), difference=(
                          f"in coffee, of tiles of 96 pixels, by {(one - other).abs().mean():.3f} of 255 on average, "
                          f"{(one - other).abs().max():.0f} at most")))


if __name__ == "__main__":
    main()
