"""Attention U-Nets beside MONAI's AttentionUnet of the same widths, in one run.

    python benchmarks/attention_unet_monai.py --work-dir work_dirs/monai

trains both, and `unet3d`, by configs/volumes/attention_unet3d_mni152.py, with the same patches in the same order, and prints
parameters, Dice on the held-out hemisphere and processor time; then time and memory of a pass. `build` is the rival of
`zoo benchmark`.
"""
import argparse
import time
from pathlib import Path
from typing import Any

import timm
from monai.networks.nets import AttentionUnet
from timm.models import register_model
from torch import nn

import zoo  # noqa: F401  registers the models
from zoo.measuring.model_benchmark import benchmark
from zoo.tools._cli import run

WIDTHS = (16, 32, 64, 128)
RUNS = {  # what differs from the config
    "attention_unet3d": [],
    "unet3d": ["model.name=unet3d"],
    "MONAI AttentionUnet": ["model.name=monai_attention_unet3d", f"model.args={dict(num_classes=3, widths=WIDTHS)}"],
}


@register_model
def monai_attention_unet3d(pretrained: bool = False, in_chans: int = 1, num_classes: int = 4, widths: tuple[int, ...] = WIDTHS,
                           **timms: Any) -> nn.Module:
    model = AttentionUnet(3, in_chans, num_classes, widths, (2,) * (len(widths) - 1))
    model.num_classes, model.spatial_dims = num_classes, 3
    return model


def build(name: str) -> nn.Module:
    """MONAI's network of the widths, channels and classes of the zoo's model `name`."""
    ours = timm.create_model(name)
    return monai_attention_unet3d(in_chans=ours.in_chans, num_classes=ours.num_classes, widths=tuple(ours.encoder.channels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/attention_unet_monai"), help="where to train")
    parser.add_argument("--rounds", type=int, default=9, help="times each pass is measured (default: 9)")
    args = parser.parse_args()

    from mmengine.registry import MODELS

    from zoo.mm import train
    from zoo.mm.config import load_config

    rows = ["| network | parameters | Dice, % | grey matter | white matter | training, s | of the processor, s |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, options in RUNS.items():
        parameters = sum(p.numel() for p in MODELS.build(load_config("attention_unet3d_mni152", options).model).parameters())
        wall, processor = time.perf_counter(), time.process_time()
        _, metrics = train("attention_unet3d_mni152", work_dir=args.work_dir / name.replace(" ", "_"), cfg_options=[
            *options, f"experiment_name={name}"])
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        rows.append(f"| {name} | {parameters / 1e6:.2f} M | {metrics['dice/mean']:.2f} | {metrics['dice/grey matter']:.2f} "
                    f"| {metrics['dice/white matter']:.2f} | {wall:.0f} | {processor:.0f} |")
    report = benchmark(["attention_unet3d_light", "attention_unet3d"], build, batch=2, size=(64, 64, 64), rounds=args.rounds)
    print("\n".join(rows), report.markdown(), sep="\n\n")


if __name__ == "__main__":
    run(main)
