"""Evaluates a checkpoint."""
import argparse
import os

from zoo.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint on the test data of its config.",
        epilog="example: python tools/test.py biformer_nano_digits work_dirs/biformer_nano_digits/epoch_40.pth")
    parser.add_argument("config", help="path of a config, or name of an installed one")
    parser.add_argument("checkpoint", help="a checkpoint that tools/train.py wrote")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), help="default: pytorch under torchrun, else none")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE",
                        help="changes to the config, such as data_root=/data/in1k")
    args = parser.parse_args()

    from zoo.mm import evaluate

    metrics = evaluate(args.config, args.checkpoint, launcher=args.launcher, cfg_options=args.cfg_options)
    if os.environ.get("RANK", "0") != "0":  # one of many processes
        return
    width = max(map(len, metrics))
    print(f"{'metric':<{width}}   value")
    print(*(f"{name:<{width}}  {value:6.2f}" for name, value in metrics.items()), sep="\n")


if __name__ == "__main__":
    run(main)
