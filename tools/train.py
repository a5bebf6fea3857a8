"""Trains a config, or a model on data of your own, on one machine or, under torchrun, slurm or mpi, on many.

With a model and data no config is needed: what the data are is found out and said, and a config that suits them is written into the
work dir.
"""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import os
from pathlib import Path

from zoo.errors import InputError
from zoo.tools._cli import Parser, run

FORMS = ("class folders, folders of pictures and masks, or of pictures and maps of fixations, COCO's JSON with its pictures, NIfTI volumes "
         "and masks, a CSV of paths and labels, or, for networks that restore pictures, a folder of them")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "biformer_nano_digits --work-dir work_dirs/digits",
                    "my_config.py --amp --cfg-options train_cfg.max_epochs=20 model.args.drop_path_rate=0.1",
                    "biformer_nano flowers/ --epochs 50", "a2n_nano_x2 holiday/")
    parser.add_argument("config", metavar="config | model",
                        help="path of a config, or name of an installed one, such as biformer_nano_digits; before data, a model's name")
    parser.add_argument("data", nargs="?", help=f"your own data: {FORMS}")
    parser.add_argument("--work-dir", help="where to write checkpoints and logs (default: work_dirs/NAME)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="PATH",
                        help="go on from a checkpoint; without PATH from the newest in the work dir, if there is one")
    parser.add_argument("--amp", action="store_true", help="mixed precision: bfloat16 where the device has it")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), help="default: pytorch under torchrun, else none")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: the config's)")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE",
                        help="changes to the config, such as data_root=/data/in1k")
    own = parser.add_argument_group("with a model and data", "What is not given suits the data.")
    own.add_argument("--epochs", type=int)
    own.add_argument("--batch", type=int, help="samples at once")
    own.add_argument("--lr", type=float, help="highest learning rate")
    own.add_argument("--size", type=int, help="side of the pictures or volumes that the network sees, in pixels or voxels")
    own.add_argument("--weights", metavar="FILE", help="start from these weights: the authors', timm's or those of another run")
    own.add_argument("--pretrained", action="store_true", help="start from the weights that timm downloads")
    own.add_argument("--freeze", action="store_true", help="train what is new only, such as the head, and keep the weights below it")
    own.add_argument("--folds", type=int, metavar="K", help="divide data without a part for validation into K parts (default: 5)")
    own.add_argument("--fold", type=int, metavar="I", help="which of them is for validation, from 0 (default: 0)")
    return parser.parse_args(arguments)


# Arguments that go with a model and data only.
OWN = ("epochs", "batch", "lr", "size", "weights", "pretrained", "freeze", "folds", "fold")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.data is not None:
        args.config, args.work_dir = prepare_own(args)
    elif given := [name for name in OWN if getattr(args, name) not in (None, False)]:
        raise InputError(f"--{given[0]} goes with a model and data (zoo train biformer_nano DATA); a config is changed by --cfg-options")

    from zoo.mm import train

    work_dir, metrics = train(args.config, work_dir=args.work_dir, resume=args.resume, amp=args.amp, launcher=args.launcher,
                              seed=args.seed, cfg_options=args.cfg_options)
    if os.environ.get("RANK", "0") != "0":  # one of many processes
        return
    print(*(f"{name} {value:.2f}" for name, value in metrics.items()), sep="\n")
    print(f"checkpoints, logs and TensorBoard events: {work_dir}")


def prepare_own(args: argparse.Namespace) -> tuple[Path, Path]:
    """Says what the data are and what will be done; the config for it, and the work dir."""
    import timm

    from zoo.mm.own_data import Wishes, kind_of, write_config
    from zoo.reading.discovery import discover, plain_pictures
    from zoo.reading.own_data import divided

    if Path(args.config).is_dir():
        raise InputError(f"{args.config} is a folder, and the model comes first: zoo train {args.data} {args.config}")
    if Path(args.config).suffix == ".py":
        raise InputError(f"{args.config} is a config, which names its data itself; before data there is a model's name")
    if "RANK" in os.environ:
        raise InputError("a model and data are for one process; many take the config.py that it writes into its work dir")
    wishes = Wishes(args.epochs, args.batch, args.lr, args.size, args.weights, args.pretrained, args.freeze)
    restores = timm.is_model(args.config) and kind_of(args.config) == "restoration"
    data = divided((plain_pictures if restores else discover)(args.data), args.folds, args.fold or 0, args.seed or 0)
    name = f"{args.config}_{data.root.absolute().stem}" + ("" if args.folds is None else f"_fold{args.fold or 0}")
    work_dir = Path(args.work_dir or Path("work_dirs") / name)
    print(*data.described(), sep="\n")
    config, told = write_config(args.config, data, work_dir, wishes)
    print(*(f"  {line}" for line in told), sep="\n")
    print(f"  samples: {work_dir / 'samples.png'}; config: {config}", flush=True)
    return config, work_dir


if __name__ == "__main__":
    run(main)
