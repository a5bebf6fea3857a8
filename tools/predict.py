"""Uses a trained model on pictures and volumes.

Names the classes of pictures, with probabilities; writes masks of pictures and volumes; draws what a detector or segmentor of the
toolboxes finds.
"""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import InputError
from zoo.tools._cli import Parser, run

if TYPE_CHECKING:
    from torch import nn

    from zoo.checkpoints import ModelInfo, Opened
    from zoo.predicting.classification import Prediction


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "work_dirs/digits/epoch_20.pth seven.png",
                    "work_dirs/digits/epoch_20.pth scans/ --top 3 -o sheet.png",
                    "work_dirs/ct/epoch_200.pth abdomen.nii.gz -o mask.nii.gz",
                    "work_dirs/mask-rcnn/epoch_12.pth street/ --threshold 0.5 -o found/")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that `zoo train` wrote")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="input",
                        help="a picture, for 3-D networks a NIfTI volume, or a folder of them")
    parser.add_argument("--top", type=int, default=5, help="classes to name for each picture (default: 5)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default: 32)")
    parser.add_argument("-o", "--output", type=Path,
                        help="write annotated pictures: a file (several pictures become a contact sheet) or a folder; for networks that "
                             "segment: write masks, an overlaid picture or a NIfTI file of the volume's shape and affine")
    parser.add_argument("--window", type=int, nargs="+", metavar="N", help="sizes of sliding windows (default: those of training)")
    parser.add_argument("--overlap", type=float, default=0.25, help="share of a window that the next one covers too (default: 0.25)")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score of a detector's boxes (default: 0.3)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)

    from zoo.checkpoints import TOOLBOX_TASKS, load_trained, opened

    checkpoint = opened(args.checkpoint)
    if checkpoint.task in TOOLBOX_TASKS:
        return find(args, checkpoint)
    model, info = load_trained(checkpoint)
    return segment(args, model, info) if info.task == "segmentation" else name(args, model, info)


def name(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo") -> int:
    """Prints, and writes onto the pictures where asked, the most probable classes."""
    from zoo.predicting.classification import predict, write_annotated
    from zoo.predicting.sheets import output_files
    from zoo.reading.pictures import find_pictures

    pictures = find_pictures(args.pictures)
    if args.output is not None:
        output_files(pictures, args.output)  # before the work, not after it

    def show(done: int) -> None:
        if len(pictures) > args.batch:
            print(f"{done}/{len(pictures)}", file=sys.stderr, flush=True)

    predictions = predict(model, info, pictures, top=args.top, batch=args.batch, progress=show)
    report(predictions)
    if args.output is not None:
        written = write_annotated(predictions, args.output)
        print(f"wrote {written[0]}" if len(written) == 1 else f"wrote {len(written)} pictures to {args.output}")
    return 0


def segment(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo") -> int:
    """Writes masks, and prints the shares of the classes in them."""
    from zoo.predicting.segmentation import write_masks

    if args.output is None:
        raise InputError(f"{args.checkpoint} segments, and its masks have to go somewhere: name a file or folder with -o")

    last = time.monotonic()

    def show(path: Path, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 2:
            print(f"{path}: window {done}/{total}", file=sys.stderr, flush=True)
            last = time.monotonic()

    for mask in write_masks(model, info, args.pictures, args.output, window=args.window, overlap=args.overlap, progress=show):
        print(mask.path)
        width = max(len(name) for name, _ in mask.shares)
        print(*(f"  {name:{width}}  {share:7.2%}" for name, share in mask.shares), sep="\n")
        print(f"wrote {mask.written}")
    return 0


def find(args: argparse.Namespace, checkpoint: "Opened") -> int:
    """Prints, and draws where asked, the instances or classes in every picture."""
    from zoo.mm.downstream import load_scene_model, predict_scenes
    from zoo.predicting.scenes import write_scenes
    from zoo.predicting.sheets import output_files
    from zoo.reading.pictures import find_pictures

    pictures = find_pictures(args.pictures)
    if args.output is not None:
        output_files(pictures, args.output)
    model, info = load_scene_model(checkpoint)

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


def report(predictions: "list[Prediction]") -> None:
    width = max(len(name) for prediction in predictions for name, _ in prediction.classes)
    for prediction in predictions:
        print(prediction.path)
        for name, probability in prediction.classes:
            print(f"  {name:{width}}  {probability:7.2%}")


if __name__ == "__main__":
    run(main)
