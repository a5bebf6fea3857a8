"""Shows what a model attends to.

Of classifiers: a picture of the mechanism for every stage, and attributions, as PNG files and one HTML page in a folder. Of U-Nets:
one picture of what their attention gates let through, over a picture or a slice of a volume.
"""
import argparse
import sys
from pathlib import Path

from zoo.attributions import ATTRIBUTIONS
from zoo.checkpoints import load_model
from zoo.cli import run
from zoo.errors import InputError
from zoo.gates import picture_gates
from zoo.predict import find_pictures, open_picture
from zoo.visualize import attribution, mechanisms, write


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/visualize.py work_dirs/digits/latest.pth seven.png -o seen\n"
               "  python tools/visualize.py biformer_tiny cat.jpg -o seen --query 0.3 0.7 --attributions gradcam\n"
               "  python tools/visualize.py work_dirs/ct/best.pth abdomen.nii.gz --slice 60 -o gates.png")
    parser.add_argument("model", help="a checkpoint that tools/train.py wrote, or a registered model's name (random weights)")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="input",
                        help="a picture or a folder of pictures; for U-Nets one picture, in 3-D a NIfTI volume")
    parser.add_argument("-o", "--output", type=Path, required=True,
                        help="folder for the PNG files and index.html; for U-Nets the picture to write")
    parser.add_argument("--query", type=float, nargs=2, default=(0.5, 0.5), metavar=("Y", "X"),
                        help="where attention is shown from, as fractions of height and width (default: the middle)")
    parser.add_argument("--attributions", nargs="*", default=list(ATTRIBUTIONS), metavar="METHOD",
                        help=f"any of {', '.join(ATTRIBUTIONS)} (default: all)")
    parser.add_argument("--target", type=int, help="class number that the attributions explain (default: the most probable)")
    parser.add_argument("--slice", type=int, metavar="N", help="axial slice of a volume (default: the middle one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    model, info = load_model(args.model)
    if info.task == "segmentation":
        if len(args.inputs) != 1:
            raise InputError(f"the gates of one picture or volume are shown at a time, {len(args.inputs)} were given")
        gates = picture_gates(model, info, args.inputs[0], args.output, slice_index=args.slice)
        print(f"wrote the maps of {gates} gates to {args.output}")
        return 0
    sections = []
    for path in find_pictures(args.inputs):
        print(f"{path} …", file=sys.stderr, flush=True)
        picture = open_picture(path, info.input_size[0])
        seen = mechanisms(model, info, picture, tuple(args.query))
        seen += [attribution(model, info, picture, method, args.target) for method in args.attributions]
        sections.append((str(path), seen))
    files = write(args.output, f"What {info.name} attends to", sections)
    print(f"wrote {len(files) - 1} pictures and {files[-1]}")
    return 0


if __name__ == "__main__":
    run(main)
