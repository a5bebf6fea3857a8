"""Names the classes of pictures, with probabilities, by a trained model."""
import argparse
import sys
from pathlib import Path

from zoo.checkpoints import load_trained
from zoo.cli import run
from zoo.predict import Prediction, find_pictures, output_files, predict, write_annotated


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/predict.py work_dirs/digits/latest.pth seven.png\n"
               "  python tools/predict.py work_dirs/digits/latest.pth scans/ --top 3 -o sheet.png")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that tools/train.py wrote")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="picture", help="a picture or a folder of pictures")
    parser.add_argument("--top", type=int, default=5, help="classes to name for each picture (default: 5)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default: 32)")
    parser.add_argument("-o", "--output", type=Path,
                        help="write annotated pictures: a file (several pictures become a contact sheet) or a folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    pictures = find_pictures(args.pictures)
    if args.output is not None:
        output_files(pictures, args.output)  # before the work, not after it
    model, info = load_trained(args.checkpoint)

    def show(done: int) -> None:
        if len(pictures) > args.batch:
            print(f"{done}/{len(pictures)}", file=sys.stderr, flush=True)

    predictions = predict(model, info, pictures, top=args.top, batch=args.batch, progress=show)
    report(predictions)
    if args.output is not None:
        written = write_annotated(predictions, args.output)
        print(f"wrote {written[0]}" if len(written) == 1 else f"wrote {len(written)} pictures to {args.output}")
    return 0


def report(predictions: list[Prediction]) -> None:
    width = max(len(name) for prediction in predictions for name, _ in prediction.classes)
    for prediction in predictions:
        print(prediction.path)
        for name, probability in prediction.classes:
            print(f"  {name:{width}}  {probability:7.2%}")


if __name__ == "__main__":
    run(main)
