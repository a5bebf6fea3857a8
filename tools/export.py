"""Exports a model to ONNX, runs the file in ONNX Runtime at several sizes and compares it with PyTorch."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import InputError
from zoo.exporting import PRECISIONS
from zoo.files import replacing
from zoo.tools._cli import Parser, run

if TYPE_CHECKING:
    from torch import nn

    from zoo.checkpoints import ModelInfo
    from zoo.exporting.all_models import Record
    from zoo.exporting.onnx import Exported
    from zoo.exporting.precision import Change


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "work_dirs/digits/epoch_20.pth -o digits.onnx",
                    "biformer_tiny -o tiny.onnx --size 384 384 --static-size --batch 1",
                    "work_dirs/digits/epoch_20.pth -o digits.onnx --precision int8 --pictures scans/",
                    "work_dirs/scenes/iter_1500.pth -o upernet.onnx",
                    "--all '*_nano' --jobs 2 -o build/onnx")
    parser.add_argument("model", nargs="?", help="a checkpoint that `zoo train` wrote, also of mmsegmentation's models and RetinaNet, "
                                                 "or a registered model's name (random weights)")
    parser.add_argument("--all", nargs="?", const="*", metavar="PATTERN",
                        help="export every registered model (that matches), and write a table; goes on where it was stopped")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="with --all, export so many at once (default: 1)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .onnx file to write; with --all, the folder")
    parser.add_argument("--size", type=int, nargs="+", metavar="N",
                        help="size to trace: height and width, of volumes depth, height and width (default: the model's own)")
    parser.add_argument("--static-size", action="store_true", help="accept images of that size only")
    parser.add_argument("--batch", type=int, help="accept batches of this size only (default: any)")
    parser.add_argument("--opset", type=int, default=20, help="ONNX operator set, 18 or newer (default: 20)")
    parser.add_argument("--spell-out", action="store_true",
                        help="deformable convolutions in operators of opset 16, not as DeformConv, which OpenVINO cannot read")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the weights and the arithmetic (default: float32)")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER",
                        help="yours, to calibrate int8 and to measure what a lower precision changes; CLASS/* are labelled")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if (args.model is None) == (args.all is None):
        raise InputError("give a model, or --all for every registered one")
    return export_one(args) if args.all is None else export_many(args)


def export_one(args: argparse.Namespace) -> int:
    from zoo.exporting.onnx import ExportError, export_onnx
    from zoo.exporting.precision import check_pictures, lower_precision

    if args.jobs != 1:
        raise InputError("--jobs is for --all")
    if args.pictures and args.precision == "float32":
        raise InputError("--pictures is for a lower --precision")
    check_pictures(args.precision, args.pictures)
    if args.output.suffix.lower() != ".onnx" and not args.output.is_dir():
        raise InputError(f"{args.output} is no name of an ONNX file; it has to end in .onnx")
    model, info = load(args.model)
    try:
        with replacing(args.output) as written:
            exported = export_onnx(model, info, written, size=args.size, free_size=not args.static_size, batch=args.batch,
                                   opset=args.opset, spell_out=args.spell_out, progress=show)
            change = None if args.precision == "float32" else lower_precision(written, args.precision, info, args.pictures, show)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(exported)
    if change is not None:
        report_change(args.precision, change)
    print(f"wrote {info.name} to {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")
    return 0


def export_many(args: argparse.Namespace) -> int:
    from zoo.exporting.all_models import TABLE, export_all
    from zoo.models import list_models

    one = {"--size": args.size, "--static-size": args.static_size or None, "--batch": args.batch, "--pictures": args.pictures,
           "--precision": None if args.precision == "float32" else args.precision}
    for option, value in one.items():
        if value is not None:
            raise InputError(f"{option} is for one model, not for --all")
    names = list_models(args.all)
    if not names:
        raise InputError(f"no registered model matches {args.all!r}")
    records = export_all(names, args.output, opset=args.opset, spell_out=args.spell_out, jobs=args.jobs, progress=show)
    for name, record in records.items():
        print(f"{name}: {summary(record)}")
    failed = sum(bool(record.failure) for record in records.values())
    print(f"{len(records) - failed} of {len(records)} exported; the table is {args.output / TABLE}")
    return 1 if failed else 0


def load(name_or_path: str) -> "tuple[nn.Module, ModelInfo]":
    """As `load_model`; also segmentors of mmsegmentation and RetinaNet."""
    from zoo.checkpoints import CHECKPOINT_SUFFIXES, TOOLBOX_TASKS, load_model, load_trained, opened

    if not name_or_path.endswith(CHECKPOINT_SUFFIXES):
        return load_model(name_or_path)
    checkpoint = opened(name_or_path)
    if checkpoint.task not in TOOLBOX_TASKS:
        return load_trained(checkpoint)

    from zoo.mm.deploy import load_deployable

    return load_deployable(checkpoint)


def show(step: str) -> None:
    print(f"{step} …", file=sys.stderr, flush=True)


def report(exported: "Exported") -> None:
    from zoo.exporting.onnx import AXES

    axes = AXES[len(exported.comparisons[0].size)]
    print(f"batch  {' x '.join(axes)}  largest difference to PyTorch, in standard deviations")
    for row in exported.comparisons:
        print(f"{row.batch:5d}  {' x '.join(f'{n:6d}' for n in row.size)}  {row.difference:.2e}")
    print(f"worst: {exported.worst:.2e}")
    sizes = "any" if exported.free_size else f"fixed ({exported.reason})"
    print(f"batch size: {'any' if exported.free_batch else 'fixed'}; {' and '.join(axes)}: {sizes}")


def report_change(precision: str, change: "Change") -> None:
    print(f"{precision} differs from float32 by {change.difference:.2e} standard deviations for a random image")
    if not change.pictures:
        return
    print(f"{precision} names the same class for {change.same} of {change.pictures} pictures")
    if change.before is None:
        print("no accuracy: no picture is in a folder named after a class")
    else:
        pictures = "" if change.labelled == change.pictures else f" for the {change.labelled} pictures in folders named after classes"
        print(f"accuracy{pictures}: float32 {change.before:.2f} %, {precision} {change.after:.2f} % ({change.after - change.before:+.2f})")


def summary(record: "Record") -> str:
    if record.failure:
        return f"failed: {record.failure}"
    return f"{record.bytes / 1e6:.1f} MB, difference {record.difference:.1e}, size {'fixed: ' + record.reason if record.reason else 'any'}"


if __name__ == "__main__":
    run(main)
