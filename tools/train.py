"""Trains a config, on one machine or, under torchrun, slurm or mpi, on many."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import os

from zoo.tools._cli import Parser, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "biformer_nano_digits --work-dir work_dirs/digits",
                    "my_config.py --amp --cfg-options train_cfg.max_epochs=20 model.args.drop_path_rate=0.1")
    parser.add_argument("config", help="path of a config, or name of an installed one, such as biformer_nano_digits")
    parser.add_argument("--work-dir", help="where to write checkpoints and logs (default: work_dirs/NAME)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="PATH",
                        help="go on from a checkpoint; without PATH from the newest in the work dir, if there is one")
    parser.add_argument("--amp", action="store_true", help="mixed precision: bfloat16 where the device has it")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), help="default: pytorch under torchrun, else none")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: the config's)")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE",
                        help="changes to the config, such as data_root=/data/in1k")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)

    from zoo.mm import train

    work_dir, metrics = train(args.config, work_dir=args.work_dir, resume=args.resume, amp=args.amp, launcher=args.launcher,
                              seed=args.seed, cfg_options=args.cfg_options)
    if os.environ.get("RANK", "0") != "0":  # one of many processes
        return
    print(*(f"{name} {value:.2f}" for name, value in metrics.items()), sep="\n")
    print(f"checkpoints, logs and TensorBoard events: {work_dir}")


if __name__ == "__main__":
    run(main)
