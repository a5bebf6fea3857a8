"""A small FAN with token-aware average pooling and the attention diversification loss (arXiv 2303.11126) beside the same without.

    python benchmarks/fan_robustness.py

trains both with three seeds by configs/classification/tap_fan_nano_digits.py, on digits of 96×96 pixels, which are 6×6 tokens, and
prints their errors on held-out digits, clean and under the corruptions of ImageNet-C: half an hour of one core. What is done is kept
in the work dir, and not done again.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

from zoo.measuring.robustness import Robustness, write_report
from zoo.mm import train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.corruptions import evaluate_corruptions
from zoo.reading.corruptions import CORRUPTIONS
from zoo.tools._cli import run

CONFIG, SIDE, SEEDS = "tap_fan_nano_digits", 96, (0, 1, 2)
NETWORKS = {  # what differs from the config
    "FAN": ["model.args.num_scales=None", "model.attention_diversification=0"],
    "TAP-FAN with ADL": [],
}
OPTIONS = [f"{part}_dataloader.dataset.{option}" for part in ("train", "val", "test")
           for option in (f"size={SIDE}", f"transform.input_size=(1,{SIDE},{SIDE})")]


def robustness(network: str, seed: int, folder: Path) -> Robustness:
    """Of the network, which is trained in `folder` unless it was."""
    report = folder / "corruptions.json"
    if not report.exists():
        options = [*OPTIONS, *NETWORKS[network]]
        train(CONFIG, work_dir=folder, resume="auto", seed=seed, cfg_options=options)
        found = evaluate_corruptions(CONFIG, latest_checkpoint(folder), cfg_options=options,
                                     progress=lambda step: print(f"{network}, seed {seed}: {step}", file=sys.stderr, flush=True))
        write_report(found, folder, None)
    return Robustness(**json.loads(report.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/fan_robustness"), help="where to train")
    args = parser.parse_args()

    found = {network: [robustness(network, seed, args.work_dir / f"{network.split()[0]}-{seed}") for seed in SEEDS]
             for network in NETWORKS}
    errors = {network: {name: [np.mean(each.errors[name]) for each in each_seed] for name in CORRUPTIONS}
              for network, each_seed in found.items()}
    baseline = {name: float(np.mean(values)) for name, values in errors["FAN"].items()}

    print("| network | seed | clean error, % | mean error under corruption, % | mean corruption error, % of FAN's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for network, each_seed in found.items():
        for seed, each in zip(SEEDS, each_seed, strict=True):
            print(f"| {network} | {seed} | {each.clean:.2f} | {each.mean_error:.2f} | {each.mean_corruption_error(baseline):.1f} |")
    print("\n| error, %, mean ± deviation over seeds |", *(f"{network} |" for network in NETWORKS))
    print("| --- |", *("---: |" for _ in NETWORKS))
    for name in CORRUPTIONS:
        cells = [f"{np.mean(errors[network][name]):.2f} ± {np.std(errors[network][name], ddof=1):.2f} |" for network in NETWORKS]
        print(f"| {name.replace('_', ' ')} |", *cells)


if __name__ == "__main__":
    run(main)
