"""Shows what a model attends to: a picture of its mechanism for every stage, and attributions, as PNG files and one HTML page."""
import argparse
import sys
from pathlib import Path

from zoo.checkpoints import load_model
from zoo.cli import run
from zoo.predict import find_pictures, open_picture
from zoo.visualize import ATTRIBUTIONS, attribution, mechanisms, write


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/visualize.py work_dirs/digits/latest.pth seven.png -o seen\n"
               "  python tools/visualize.py biformer_tiny cat.jpg -o seen --query 0.3 0.7 --attributions gradcam")
    parser.add_argument("model", help="a checkpoint that tools/train.py wrote, or a registered model's name (random weights)")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="picture", help="a picture or a folder of pictures")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the PNG files and index.html")
    parser.add_argument("--query", type=float, nargs=2, default=(0.5, 0.5), metavar=("Y", "X"),
                        help="where attention is shown from, as fractions of height and width (default: the middle)")
    parser.add_argument("--attributions", nargs="*", default=list(ATTRIBUTIONS), metavar="METHOD",
                        help=f"any of {', '.join(ATTRIBUTIONS)} (default: all)")
    parser.add_argument("--target", type=int, help="class number that the attributions explain (default: the most probable)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    paths = find_pictures(args.pictures)
    model, info = load_model(args.model)
    sections = []
    for path in paths:
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
