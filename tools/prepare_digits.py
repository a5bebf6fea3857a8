"""Writes scenes of handwritten digits in the formats of COCO and mmsegmentation, for the *_digits configs, or of YOLO."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import sys
from pathlib import Path

from zoo.tools._cli import Parser, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "data/digits --train 1000 --val 100")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/digits"), help="where to write (default: data/digits)")
    parser.add_argument("--train", type=int, default=1000, help="scenes to train on (default: 1000)")
    parser.add_argument("--val", type=int, default=100, help="scenes of other digits to evaluate on (default: 100)")
    parser.add_argument("--size", type=int, default=96, help="pixels on a side (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--format", choices=("coco", "yolo"), default="coco",
                        help="coco: with COCO annotations and label maps; yolo: with text files, for zoo.yolo (default: coco)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)

    from zoo.reading.digits import write_digit_scenes

    def show(split: str, done: int, scenes: int) -> None:
        if done % 200 == 0 or done == scenes:
            print(f"{split} {done}/{scenes}", file=sys.stderr, flush=True)

    write_digit_scenes(args.folder, args.train, args.val, args.size, args.seed, show, args.format)
    what = "COCO annotations and label maps" if args.format == "coco" else "YOLO's labels, for digits.yaml and digits-pose.yaml,"
    print(f"wrote {args.train} scenes to train on and {args.val} to evaluate on, with {what} to {args.folder}")


if __name__ == "__main__":
    run(main)
