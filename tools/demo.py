"""Trains biformer_nano on handwritten digits, exports it to ONNX, compares, and pictures its predictions."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import sys
from pathlib import Path

from zoo.tools._cli import Parser, run

REQUIRED = 97.0  # per cent of the held-out digits


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "--work-dir work_dirs/demo")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"), help="where to write (default: work_dirs/demo)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)

    from zoo.mm.demo import run_demo

    demo = run_demo(args.work_dir)
    right = sum(prediction.classes[0][0] == truth for truth, prediction in demo.predictions)
    sizes = "any height and width" if demo.exported.free_size else "fixed size"
    rows = [
        ("model", f"biformer_nano, {demo.parameters / 1e6:.2f} M parameters"),
        ("accuracy on 360 held-out digits", f"{demo.accuracy:.2f} %"),
        ("training, evaluation included", f"{demo.training_seconds:.0f} s (what was left of it, if an earlier run had begun)"),
        ("ONNX Runtime against PyTorch", f"largest difference {demo.exported.worst:.1e}, {len(demo.exported.comparisons)} shapes, {sizes}"),
        ("digits in the picture", f"{right} of {len(demo.predictions)} named correctly"),
        ("checkpoint", demo.checkpoint),
        ("ONNX file", demo.exported.path),
        ("picture of predictions", demo.picture),
        ("curves", f"tensorboard --logdir {args.work_dir}"),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    print(*(f"{name:<{width}}  {value}" for name, value in rows), sep="\n")
    if demo.accuracy < REQUIRED:
        print(f"error: the accuracy is below {REQUIRED} %", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main)
