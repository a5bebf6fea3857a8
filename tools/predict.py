"""Uses a trained model on pictures and volumes.

Names the classes of pictures, with probabilities; writes label maps of pictures and masks of volumes; finds objects, and cuts them out;
writes sharper pictures, and maps of where people look. Answers are printed, and written as tables, as COCO's results, as pictures and
masks.
"""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import InputError
from zoo.tools._cli import Parser, Progress, run

if TYPE_CHECKING:
    from torch import nn

    from zoo.checkpoints import ModelInfo, Opened
    from zoo.predicting.answers import Answers
    from zoo.predicting.classification import Prediction
    from zoo.predicting.cutouts import CutOut
    from zoo.predicting.fixations import Looked
    from zoo.predicting.label_maps import Labelled
    from zoo.predicting.scenes import Scene, SceneInfo


# By option: what it is for, and what it is where it is not given.
OPTIONS = {
    "top": ("networks that name classes", 5), "batch": ("networks that name classes", 32),
    "window": ("networks that look at pictures or volumes in windows", None),
    "overlap": ("networks that look at pictures or volumes in windows", 0.25), "threshold": ("detectors", 0.3),
    "ensemble": ("networks that restore pictures", False),
    "resolution": ("networks that cut out objects", None),
    "condition": ("networks that say where people look in pictures of several kinds", None),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "work_dirs/digits/epoch_20.pth seven.png",
                    "work_dirs/digits/epoch_20.pth scans/ --top 3 -o answers.csv",
                    "work_dirs/ct/epoch_200.pth abdomen.nii.gz -o mask.nii.gz",
                    "work_dirs/mask-rcnn/epoch_12.pth street/ --threshold 0.5 -o answers.json",
                    "work_dirs/sharper/epoch_40.pth holiday/ --ensemble -o larger/",
                    "work_dirs/looks/epoch_40.pth holiday/ -o looked/",
                    "digits.onnx scans/ -o sheet.png",
                    "latest.pth photos/ --model inspyrenet_swin_b -o cutouts/")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that `zoo train` wrote, or an ONNX file that `zoo export` wrote")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="input",
                        help="a picture, for 3-D networks a NIfTI volume, or a folder of them")
    parser.add_argument("--model", metavar="NAME",
                        help="the model that a file of its authors' weights is for, which does not say so itself; of networks that restore "
                             "pictures, cut out objects or say where people look")
    parser.add_argument("--top", type=int, help="classes to name for each picture (default: 5)")
    parser.add_argument("--batch", type=int, help="pictures at once (default: 32)")
    parser.add_argument("-o", "--output",
                        help="where to write answers: NAME.csv or NAME.json, of detectors in COCO's form; a picture (several become a "
                             "contact sheet), for networks that segment a label map, with the overlaid picture beside it, or a NIfTI mask, "
                             "for networks that restore the picture itself, "
                             "for those that cut out objects the object on a transparent background, with its mask beside it, "
                             "for those that say where people look a grey map, with the picture under heat beside it; "
                             "any name without a suffix: a folder with a table and these files")
    parser.add_argument("--window", type=int, nargs="+", metavar="N",
                        help="sizes of sliding windows (default: those of training; 256 256 where pictures are restored)")
    parser.add_argument("--overlap", type=float,
                        help="share of a window that the next one covers too (default: 0.25; 0.125 where pictures are restored)")
    parser.add_argument("--ensemble", action="store_true", default=None,
                        help="restore the mean of a picture turned and mirrored in all eight ways; eight times the work")
    parser.add_argument("--resolution", type=int, metavar="N",
                        help="shorter side, in pixels, at which the edges of objects are looked at (default: 10/3 of the size of training)")
    parser.add_argument("--condition", type=int, metavar="N",
                        help="the kind of the pictures, for networks such as sum, where people look: 0 natural, looks by mouse, 1 natural, "
                             "by eye, 2 shops, 3 user interfaces (default: that of training, or 0)")
    parser.add_argument("--threshold", type=float, help="lowest score of a detector's boxes (default: 0.3)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)

    from timm.models import is_model, model_entrypoint

    from zoo.checkpoints import TOOLBOX_TASKS, load_released, load_trained, opened
    from zoo.predicting.exported import ExportedNetwork, exported_info, exported_scene_info, predict_exported
    from zoo.reading.onnx_files import ONNX_SUFFIX

    if args.checkpoint.suffix.lower() == ONNX_SUFFIX:
        network = ExportedNetwork(args.checkpoint)
        if network.of_toolbox:
            return find(args, exported_scene_info(network), lambda *given, **options: predict_exported(network, *given, **options))
        model, info = network, exported_info(network)
    elif args.model is not None:
        if is_model(args.model) and not hasattr(sys.modules[model_entrypoint(args.model).__module__], "TASK"):
            raise InputError("--model is for networks that restore pictures, cut out objects or say where people look, and "
                             f"{args.model} is none of them")
        model, info = load_released(args.model, args.checkpoint)
    else:
        checkpoint = opened(args.checkpoint)
        if checkpoint.task in TOOLBOX_TASKS:
            return find_by_toolbox(args, checkpoint)
        model, info = load_trained(checkpoint)
    by_task = {"segmentation": segment, "restoration": restore, "saliency": cut_out, "fixations": look}
    return by_task.get(info.task, name)(args, model, info)


def name(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo") -> int:
    """Names the most probable classes of pictures."""
    from zoo.predicting.classification import ClassAnswers, predict_each
    from zoo.reading.pictures import find_pictures

    settle(args, info.name, "top", "batch")
    pictures = unique(find_pictures(args.inputs))
    answers = None if args.output is None else ClassAnswers(pictures, args.output)
    failures = Failures(len(pictures))

    def show(done: int) -> None:
        if len(pictures) > args.batch:
            print(f"{done}/{len(pictures)}", file=sys.stderr, flush=True)

    def described(prediction: "Prediction") -> list[str]:
        width = max(len(name) for name, _ in prediction.classes)
        return [f"{name:{width}}  {probability:7.2%}" for name, probability in prediction.classes]

    found = predict_each(model, info, pictures, top=args.top, batch=args.batch, progress=show, failed=failures)
    return report(found, described, answers, failures)


def segment(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo") -> int:
    """Finds the class of every position of pictures or volumes."""
    from zoo.predicting.segmentation import find_inputs, mask_answers, segment_each

    settle(args, info.name, "window", "overlap")
    if args.output is None:
        raise InputError(f"{args.checkpoint} segments, and its masks have to go somewhere: name a file or folder with -o")
    files = unique(find_inputs(args.inputs, info))
    answers, failures, progress = mask_answers(model, info, files, args.output), Failures(len(files)), Progress()

    def show(path: Path, done: int, total: int) -> None:
        progress(f"{path}: window {done}/{total}")

    def described(labelled: "Labelled") -> list[str]:
        width = max(map(len, labelled.classes))
        return [f"{name:{width}}  {share:7.2%}" for name, share in labelled.shares()]

    found = segment_each(model, info, files, window=args.window, overlap=args.overlap, progress=show, failed=failures)
    return report(found, described, answers, failures)


def restore(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo") -> int:
    """Writes what a network makes of pictures."""
    from zoo.predicting.restoration import OVERLAP, RestoredPictures, restore_each
    from zoo.reading.pictures import find_pictures

    args.overlap = OVERLAP if args.overlap is None else args.overlap
    settle(args, info.name, "window", "overlap", "ensemble")
    if args.output is None:
        raise InputError(f"{args.checkpoint} restores pictures, which have to go somewhere: name a file or folder with -o")
    files, progress = unique(find_pictures(args.inputs)), Progress()
    answers, failures = RestoredPictures(files, args.output), Failures(len(files))
    found = restore_each(model, info, files, window=args.window, overlap=args.overlap, ensemble=args.ensemble, failed=failures,
                         progress=lambda path, done, total: progress(f"{path}: tile {done}/{total}"))
    return report(found, lambda restored: [f"{size[0]}×{size[1]}" for size in (restored.picture.size,)], answers, failures)


def cut_out(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo") -> int:
    """Cuts the object out of pictures."""
    from zoo.predicting.cutouts import CutOuts, cut_each
    from zoo.reading.pictures import find_pictures

    settle(args, info.name, "resolution")
    if args.output is None:
        raise InputError(f"{args.checkpoint} cuts out objects, and these have to go somewhere: name a file or folder with -o")
    pictures = unique(find_pictures(args.inputs))
    answers, failures = CutOuts(pictures, args.output), Failures(len(pictures))

    def counted() -> "Iterator[CutOut]":
        for done, found in enumerate(cut_each(model, info, pictures, resolution=args.resolution, failed=failures), 1):
            if len(pictures) > 1:
                print(f"{done}/{len(pictures)}", file=sys.stderr, flush=True)
            yield found

    return report(counted(), lambda found: [f"object  {found.share():7.2%}, certain to {found.certainty:.0%}"], answers, failures)


def look(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo") -> int:
    """Says where people look in pictures."""
    from zoo.predicting.fixations import FixationMaps, look_each
    from zoo.reading.pictures import find_pictures

    kinds = getattr(model, "conditions", None)
    settle(args, info.name, *(("condition",) if kinds else ()))
    if args.condition is not None:
        if not 0 <= args.condition < kinds:
            raise InputError(f"--condition is a kind of pictures that {info.name} knows, 0 to {kinds - 1}, got {args.condition}")
        vars(model)["condition"] = args.condition
    if args.output is None:
        raise InputError(f"{args.checkpoint} says where people look, and its maps have to go somewhere: name a file or folder with -o")
    pictures = unique(find_pictures(args.inputs))
    answers, failures = FixationMaps(pictures, args.output), Failures(len(pictures))

    def counted() -> "Iterator[Looked]":
        for done, found in enumerate(look_each(model, info, pictures, failed=failures), 1):
            if len(pictures) > 1:
                print(f"{done}/{len(pictures)}", file=sys.stderr, flush=True)
            yield found

    def described(found: "Looked") -> list[str]:
        x, y = found.peak()
        return [f"most at column {x}, row {y}; half of it in {found.focus():.1%} of the picture"]

    return report(counted(), described, answers, failures)


def find_by_toolbox(args: argparse.Namespace, checkpoint: "Opened") -> int:
    from zoo.mm.downstream import load_scene_model, predict_scenes

    model, info = load_scene_model(checkpoint)
    return find(args, info, lambda *given, **options: predict_scenes(model, info, *given, **options))


def find(args: argparse.Namespace, info: "SceneInfo", predict: "Callable[..., Iterator[Scene]]") -> int:
    """Finds the instances or classes in pictures."""
    from zoo.predicting.scenes import scene_answers
    from zoo.reading.pictures import find_pictures

    options = ("threshold",) if info.toolbox == "mmdet" else ()
    settle(args, str(args.checkpoint), *options)
    given = {option: getattr(args, option) for option in options}
    pictures = unique(find_pictures(args.inputs))
    answers = None if args.output is None else scene_answers(pictures, args.output, info)
    failures = Failures(len(pictures))

    def counted() -> "Iterator[Scene]":
        for done, scene in enumerate(predict(pictures, failed=failures, **given), 1):
            if len(pictures) > 1:
                print(f"{done}/{len(pictures)}", file=sys.stderr, flush=True)
            yield scene

    return report(counted(), lambda scene: scene.described(info.classes), answers, failures)


def settle(args: argparse.Namespace, name: str, *options: str) -> None:
    """Fills in what these options are by default. Raises InputError if one that would do nothing was given."""
    for option, (kind, default) in OPTIONS.items():
        if option in options:
            setattr(args, option, default if getattr(args, option) is None else getattr(args, option))
        elif getattr(args, option) is not None:
            raise InputError(f"--{option} is for {kind}, and {name} is none of them")


def unique(paths: list[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))


class Failures:
    """Files that cannot be read: of many each is told and the others go on; if it is the only one there is nothing else to do."""

    def __init__(self, inputs: int):
        self.inputs, self.count = inputs, 0

    def __call__(self, path: Path, error: InputError) -> None:
        if self.inputs == 1:
            raise error
        self.count += 1
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def report(found: Iterator, described: Callable[..., list[str]], answers: "Answers | None", failures: Failures) -> int:
    """Prints the answers and writes them where asked; exit status 1 if there are files without one."""
    for answer in found:
        print(answer.path)
        print(*(f"  {line}" for line in described(answer)), sep="\n", flush=True)
        if answers is not None:
            answers.add(answer)
    if failures.count == failures.inputs:
        raise InputError(f"none of the {failures.inputs} files could be read")
    if answers is not None:
        written = answers.close()
        print(f"wrote {' and '.join(map(str, written))}" if len(written) < 3 else f"wrote {len(written)} files to {answers.output}")
    if failures.count:
        print(f"{failures.count} of {failures.inputs} files could not be read; the others are done", file=sys.stderr)
    return 1 if failures.count else 0


if __name__ == "__main__":
    run(main)
