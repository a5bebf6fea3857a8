"""Pictures what the attention gates of a trained U-Net let through, over a picture or a slice of a volume."""
import argparse
from pathlib import Path

from zoo.checkpoints import load_trained
from zoo.cli import run
from zoo.gates import picture_gates


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/visualize.py work_dirs/ct/best.pth abdomen.nii.gz --slice 60 -o gates.png")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that tools/train.py wrote")
    parser.add_argument("input", type=Path, help="a picture, or for 3-D networks a NIfTI volume")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture to write")
    parser.add_argument("--slice", type=int, metavar="N", help="axial slice of a volume (default: the middle one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    model, info = load_trained(args.checkpoint)
    gates = picture_gates(model, info, args.input, args.output, slice_index=args.slice)
    print(f"wrote the maps of {gates} gates to {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
