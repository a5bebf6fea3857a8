"""Shows what a model attends to.

Of classifiers: a picture of the mechanism for every stage, and attributions. Of U-Nets: what their attention gates let through, over
a picture or a slice of a volume. PNG files and one HTML page in a folder; of one input of a U-Net, one sheet if a picture is named.
With --attention instead: one page on which every head of every layer is asked from any place, and a table of numbers, attention.csv.
"""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import InputError
from zoo.seeing import ATTRIBUTIONS
from zoo.tools._cli import Parser, run

if TYPE_CHECKING:
    from torch import nn

    from zoo.checkpoints import ModelInfo
    from zoo.seeing.page import Seen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "work_dirs/digits/epoch_20.pth seven.png -o seen",
                    "biformer_tiny cat.jpg -o seen --query 0.3 0.7 --attributions gradcam",
                    "vit_small_patch16_224 cat.jpg -o seen --attention",
                    "work_dirs/ct/epoch_200.pth abdomen.nii.gz --slice 60 -o gates.png")
    parser.add_argument("model", help="a checkpoint that `zoo train` wrote, or a registered model's name (random weights)")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="input",
                        help="a picture or a folder of pictures; for 3-D networks NIfTI volumes")
    parser.add_argument("-o", "--output", required=True,
                        help="folder for the PNG files and index.html; for one input of a U-Net also a picture's name")
    parser.add_argument("--query", type=float, nargs=2, metavar=("Y", "X"),
                        help="where attention is shown from, as fractions of height and width (default: the middle)")
    parser.add_argument("--attributions", nargs="*", metavar="METHOD",
                        help=f"any of {', '.join(ATTRIBUTIONS)} (default: all)")
    parser.add_argument("--attention", action="store_true", default=None,
                        help="all heads of all layers in which tokens attend to one another: of any ViT of timm, FAN, DeiT-CB")
    parser.add_argument("--target", type=int, help="class number that the attributions explain (default: the most probable)")
    parser.add_argument("--slice", type=int, metavar="N", help="axial slice of a volume (default: the middle one)")
    return parser.parse_args(arguments)


def see_classes(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo") -> "Callable[[Path], list[Seen]]":
    """What shows a classifier's picture; all options are checked before."""
    from zoo.reading.pictures import open_picture
    from zoo.seeing.attributions import check_method
    from zoo.seeing.classifiers import attribution, check_target, mechanisms
    from zoo.seeing.mechanism_pictures import WITH_QUERY, pictured

    refuse(args, f"is for volumes, and {info.name} takes whole pictures", "slice")
    methods = list(dict.fromkeys(ATTRIBUTIONS if args.attributions is None else args.attributions))
    for method in methods:
        check_method(method)
    if not methods:
        refuse(args, "is for attributions, and none is asked for", "target")
    if args.target is not None:
        check_target(args.target, model.num_classes)
    kinds = pictured(model)
    if not kinds & WITH_QUERY:
        known = ", ".join(sorted(kind.__name__ for kind in WITH_QUERY))
        refuse(args, f"is for {known}, and {info.name} has none of these layers", "query")

    def see(path: Path) -> "list[Seen]":
        picture = open_picture(path, info.input_size[0])
        # Attributions do not need layers with pictures of their own; without either, `mechanisms` says what it needs.
        seen = mechanisms(model, info, picture, tuple(args.query or (0.5, 0.5))) if kinds or not methods else []
        return seen + [attribution(model, info, picture, method, args.target) for method in methods]
    return see


def write_attention(args: argparse.Namespace, model: "nn.Module", info: "ModelInfo", remark: str) -> int:
    """The page of all heads, and their numbers; all options are checked before."""
    from zoo.predicting.answers import output_suffix
    from zoo.reading.pictures import find_pictures
    from zoo.seeing.attention_page import write
    from zoo.seeing.classifiers import attention

    refuse(args, "does not go with --attention", "query", "attributions", "target", "slice")
    output_suffix(args.output, ())
    paths = find_pictures(args.inputs)
    page, table = write(args.output, f"What {info.name} attends to", paths, lambda path: attention(model, info, path), remark)
    print(f"wrote {page} and {table}")
    return 0


def refuse(args: argparse.Namespace, why: str, *options: str) -> None:
    """Raises InputError if any of these options was given."""
    for option in options:
        if getattr(args, option) is not None:
            raise InputError(f"--{option} {why}")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)

    import timm

    from zoo.checkpoints import load_model
    from zoo.predicting.answers import check_keeps_inputs, output_suffix
    from zoo.predicting.segmentation import find_inputs
    from zoo.reading.pictures import PICTURE_SUFFIXES, find_pictures
    from zoo.seeing.gate_pictures import picture_gates, see_gates
    from zoo.seeing.page import folder_for_pictures, write

    model, info = load_model(args.model)
    remark = ""
    if timm.is_model(args.model):
        remark = (f"The weights of {info.name} are random: the pictures show what an untrained network does, and mean nothing about the "
                  "inputs. Give a checkpoint that `zoo train` wrote to see a trained one.")
        print(f"note: {remark}", file=sys.stderr, flush=True)
    if info.task == "restoration":
        raise InputError(f"{info.name} restores pictures: it names no classes, and has no picture here; zoo.capture gives its gates")
    if info.task == "segmentation":
        refuse(args, f"is for classifiers, and {info.name} segments", "query", "attributions", "target", "attention")
    if args.attention:
        return write_attention(args, model, info, remark)
    if info.task == "segmentation":
        paths, title = find_inputs(args.inputs, info), f"What the gates of {info.name} let through"
        if output_suffix(args.output, PICTURE_SUFFIXES):
            if len(paths) != 1:
                raise InputError(f"the gates of one input fit into one picture, and {len(paths)} were given; "
                                 f"give a folder instead of {args.output}")
            check_keeps_inputs(paths, [Path(args.output)])
            gates = picture_gates(model, info, paths[0], args.output, slice_index=args.slice)
            print(f"wrote the maps of {gates} gates to {args.output}")
            return 0
        see = partial(see_gates, model, info, slice_index=args.slice)
    else:
        output_suffix(args.output, ())
        see, paths, title = see_classes(args, model, info), find_pictures(args.inputs), f"What {info.name} attends to"
    sections = []
    with folder_for_pictures(args.output):
        for path in paths:
            print(f"{path} …", file=sys.stderr, flush=True)
            sections.append((str(path), see(path)))
        files = write(args.output, title, sections, remark)
    print(f"wrote {len(files) - 1} pictures and {files[-1]}")
    return 0


if __name__ == "__main__":
    run(main)
