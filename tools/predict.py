"""Names the classes of pictures, with probabilities, by a trained model; or draws what a detector or segmentor finds in them."""
import argparse
import sys
from pathlib import Path

from zoo.checkpoints import load_trained, recorded_task
from zoo.cli import run
from zoo.predict import Prediction, find_pictures, output_files, predict, write_annotated

TOOLBOXES = ("mmdet", "mmseg")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/predict.py work_dirs/digits/latest.pth seven.png\n"
               "  python tools/predict.py work_dirs/digits/latest.pth scans/ --top 3 -o sheet.png\n"
               "  python tools/predict.py work_dirs/mask-rcnn/epoch_12.pth street/ --threshold 0.5 -o found/")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that tools/train.py wrote")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="picture", help="a picture or a folder of pictures")
    parser.add_argument("--top", type=int, default=5, help="classes to name for each picture (default: 5)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default: 32)")
    parser.add_argument("-o", "--output", type=Path,
                        help="write annotated pictures: a file (several pictures become a contact sheet) or a folder")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score of a detector's boxes (default: 0.3)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if recorded_task(args.checkpoint) in TOOLBOXES:
        return find(args)
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


def find(args: argparse.Namespace) -> int:
    """Prints, and draws where asked, the instances or classes in every picture."""
    from zoo.mm.downstream import load_scene_model, predict_scenes, write_scenes

    pictures = find_pictures(args.pictures)
    if args.output is not None:
        output_files(pictures, args.output)
    model, info = load_scene_model(args.checkpoint)

    def show(done: int) -> None:
        if len(pictures) > 1:
            print(f"{done}/{len(pictures)}", file=sys.stderr, flush=True)

    scenes = predict_scenes(model, info, pictures, threshold=args.threshold, progress=show)
    for scene in scenes:
        print(scene.path)
        print(*(f"  {line}" for line in scene.described(info.classes)), sep="\n")
    if args.output is not None:
        written = write_scenes(scenes, info, args.output)
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
