"""Evaluates a checkpoint on the test data of its config."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import InputError
from zoo.files import check_writable, make_folder
from zoo.tools._cli import Parser, run

if TYPE_CHECKING:
    from zoo.measuring.per_class import Row


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "biformer_nano_digits work_dirs/digits/epoch_20.pth",
                    "biformer_nano_digits work_dirs/digits/epoch_20.pth --per-class --csv classes.csv",
                    "biformer_tiny_in1k tiny.pth --corruptions work_dirs/tiny --imagenet-c /data/imagenet-c")
    parser.add_argument("config", help="path of a config, or name of an installed one")
    parser.add_argument("checkpoint", help="a checkpoint that `zoo train` wrote")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), help="default: pytorch under torchrun, else none")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE",
                        help="changes to the config, such as data_root=/data/in1k")
    parser.add_argument("--per-class", action="store_true",
                        help="also a row for each class: precision, recall, F1 and accuracy, with the expected calibration error; of masks "
                             "IoU and Dice, of volumes Dice, HD95 and surface Dice; of boxes and their masks average precision")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows of --per-class there too")
    parser.add_argument("--corruptions", type=Path, metavar="FOLDER",
                        help="also under the 15 corruptions of ImageNet-C at 5 severities; writes numbers and curves to FOLDER")
    parser.add_argument("--baseline", metavar="FILE", help="corruptions.json of the model that mean corruption error is relative to "
                                                           "(default for 1000 classes: AlexNet)")
    parser.add_argument("--imagenet-c", type=Path, metavar="ROOT", help="read ImageNet-C's images instead of corrupting the test data")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.csv is not None and not args.per_class:
        raise InputError("--csv is for the numbers of --per-class")
    if args.corruptions is not None:
        if args.per_class:
            raise InputError("--per-class does not go with --corruptions")
        return corruptions(args)
    if args.baseline or args.imagenet_c:
        raise InputError("--baseline and --imagenet-c go with --corruptions")

    from zoo.mm.training import evaluate, evaluate_classes

    if args.csv is not None:
        check_writable(args.csv)
    rows, given = [], {"launcher": args.launcher, "cfg_options": args.cfg_options}
    if args.per_class:
        metrics, rows = evaluate_classes(args.config, args.checkpoint, **given)
    else:
        metrics = evaluate(args.config, args.checkpoint, **given)
    if not is_first_process():
        return None
    width = max(map(len, metrics))
    print(f"{'metric':<{width}}   value")
    print(*(f"{name:<{width}}  {value:6.2f}" for name, value in metrics.items()), sep="\n")
    if rows:
        show_classes(rows, args.csv)
    return None


def show_classes(rows: "list[Row]", path: Path | None) -> None:
    from zoo.measuring.class_tables import table, with_mean, write_csv

    rows = with_mean(rows)
    print("", *table(rows), sep="\n")
    if path is not None:
        write_csv(rows, path)
        print(f"wrote {path}")


def corruptions(args: argparse.Namespace) -> None:
    from zoo.measuring import robustness
    from zoo.mm.config import load_config
    from zoo.mm.corruptions import check_corruptible, evaluate_corruptions

    baseline, unit = None, ""
    model = load_config(args.config, args.cfg_options).model
    if args.baseline:
        baseline, unit = robustness.read_baseline(args.baseline), args.baseline
    elif model.type == "ImageClassifier" and model.get("args", {}).get("num_classes", 1000) == 1000:
        baseline, unit = robustness.ALEXNET, "AlexNet on ImageNet-C"
    if baseline is not None:
        robustness.check_baseline(baseline)
    check_corruptible(args.config, args.cfg_options, args.imagenet_c)
    make_folder(args.corruptions)
    found = evaluate_corruptions(
        args.config, args.checkpoint, folder=args.imagenet_c, launcher=args.launcher, cfg_options=args.cfg_options,
        progress=lambda step: print(step, file=sys.stderr, flush=True))
    if not is_first_process():
        return
    print(f"{'error, %':<18} {'1':>6} {'2':>6} {'3':>6} {'4':>6} {'5':>6}")
    for name, errors in found.errors.items():
        print(f"{name:<18}", *(f"{error:6.2f}" for error in errors))
    print(f"clean error: {found.clean:.2f} %; mean error under corruption: {found.mean_error:.2f} %")
    if baseline is not None:
        print(f"mean corruption error: {found.mean_corruption_error(baseline):.2f} % of that of {unit}")
    for path in robustness.write_report(found, args.corruptions, baseline):
        print(f"wrote {path}")


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    run(main)
