"""Trains heads that answer for bags of pictures, such as patches of a slide, and shows what they attend to.

A bag is a folder of pictures, whose features a frozen network computes once, or a file of features that CLAM (.pt) or TRIDENT (.h5)
wrote. Bags lie in folders of their classes, or in a CSV of paths and labels. Heads of attention learn side by side: abmil, acmil,
acmil_multi_head. With --head a head that was trained answers for bags, whatever their folders say.
"""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.bags import HEADS
from zoo.errors import InputError
from zoo.files import make_folder, replacing
from zoo.tools._cli import Parser, Progress, run

if TYPE_CHECKING:
    from zoo.bags.features import Features

SHEETS = 24


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "slides/ --model vit_small_patch14_dinov2.lvd142m --pretrained", "features.csv --heads acmil",
                    "slides/ --model vit_small_patch14_dinov2.lvd142m --pretrained --head work_dirs/bags_slides/acmil.pth")
    parser.add_argument("data", help="folders of classes, maybe in train and val, that hold bags; or a CSV of bags, labels, maybe splits")
    parser.add_argument("--model", help="of folders of pictures, the frozen network: a name, of timm or the zoo, or a checkpoint")
    parser.add_argument("--weights", metavar="FILE", help="the network's weights: the authors', timm's or those of another run")
    parser.add_argument("--pretrained", action="store_true", help="the weights that timm downloads")
    parser.add_argument("--size", type=int, help="side of the pictures that the network sees, in pixels (default: its own)")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="which to train (default: all)")
    parser.add_argument("--head", metavar="FILE", help="do not train: answer with this head")
    parser.add_argument("--work-dir", help="where to write features, heads, tables and sheets (default: work_dirs/bags_DATA)")
    parser.add_argument("--hidden", type=int, help="width of the heads (default: half of the features')")
    parser.add_argument("--masked", type=int, help="instances of which 60 %% are masked in training (default: 10; for bags of hundreds)")
    parser.add_argument("--epochs", type=int, default=50, help="of each head (default: 50)")
    parser.add_argument("--lr", type=float, default=1e-4, help="highest learning rate (default: 0.0001)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--folds", type=int, metavar="K", help="divide bags without a part for validation into K parts (default: 5)")
    parser.add_argument("--fold", type=int, default=0, metavar="I", help="which of them is for validation, from 0 (default: 0)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)

    from zoo.bags.training import Recipe, read_head, train_head, write_head
    from zoo.reading.bags import discover_bags, divided_bags

    recipe = Recipe(args.epochs, args.lr, args.seed)
    head = read_head(args.head) if args.head else None
    bags = discover_bags(args.data)
    bags = bags if head else divided_bags(bags, args.folds, args.fold, args.seed)
    print(*bags.described(), sep="\n", flush=True)
    work_dir = Path(args.work_dir or Path("work_dirs") / f"bags_{bags.root.absolute().stem}")
    features, device = features_of(args, bags, work_dir)
    make_folder(work_dir)
    if head:
        answers(*head, features, bags, [bag for split in bags.splits.values() for bag in split], work_dir, Path(args.head).stem)
        return
    width, show = features(bags.splits["train"][0]).shape[1], Progress()
    started = time.monotonic()
    everything = [bag for split in bags.splits.values() for bag in split]
    for i, bag in enumerate(everything):
        if features(bag).shape[1] != width:
            raise InputError(f"{bag.files[0]} holds features of width {features(bag).shape[1]}, and others of {width}")
        show(f"features of bags: {i + 1}/{len(everything)}")
    print(f"features of {len(everything)} bags: {time.monotonic() - started:.1f} s", flush=True)
    settings = {name: value for name, value in (("hidden", args.hidden), ("masked", args.masked)) if value is not None}
    rows = []
    for name in dict.fromkeys(args.heads):
        given: dict[str, Any] = {key: value for key, value in settings.items() if not (name == "abmil" and key == "masked")}
        trained = train_head(name, features, bags.splits, len(bags.classes), width, recipe, given, device,
                             lambda epoch, name=name: show(f"{name}: epoch {epoch}/{recipe.epochs}"))
        write_head(trained, bags.classes, work_dir / f"{name}.pth")
        rows.append((name, trained.parameters, round(trained.accuracy, 2), round(trained.auc, 2), round(trained.seconds, 1)))
        answers(trained.head, bags.classes, features, bags, bags.splits["val"], work_dir, name)
    with replacing(work_dir / "heads.csv") as written, written.open("w", newline="") as file:
        csv.writer(file).writerows([("head", "parameters", "accuracy", "auc", "seconds"), *rows])
    print(f"\n{'head':<17} {'parameters':>10} {'accuracy':>9} {'AUC':>8} {'seconds':>8}")
    for name, count, accuracy, auc, seconds in rows:
        print(f"{name:<17} {count:>10} {accuracy:>7.2f} % {auc:>6.2f} % {seconds:>8.1f}")
    print(f"\nwrote {', '.join(f'{name}.pth' for name, *_ in rows)} and heads.csv to {work_dir}")


def features_of(args: argparse.Namespace, bags: Any, work_dir: Path) -> "tuple[Features, str]":
    """What gives a bag's features, and where heads compute."""
    import torch

    from zoo.bags.features import CachedFeatures, of_files
    from zoo.probing.networks import open_network

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if bags.kind == "features":
        if args.model:
            raise InputError(f"--model computes features of pictures, and {bags.root} holds files of features")
        return of_files, device
    if not args.model:
        raise InputError(f"{bags.root} holds folders of pictures; --model names the network that computes their features")
    network, info, _, random = open_network(args.model, weights=args.weights, pretrained=args.pretrained, size=args.size, seed=args.seed)
    if random:
        print(f"note: the weights of {info.name} are random; --pretrained or --weights gives others", file=sys.stderr, flush=True)
    return CachedFeatures(network.to(device), info, work_dir / "features"), device


def answers(head: Any, classes: Any, features: "Features", bags: Any, chosen: Any, work_dir: Path, name: str) -> None:
    """Writes the answers for bags, NAME.csv, and of folders of pictures the sheets of up to `SHEETS` of them, NAME/BAG.png."""
    from zoo.bags.sheets import contact_sheet, write_sheet
    from zoo.bags.training import answer

    rows = []
    for i, bag in enumerate(chosen):
        found = answer(head, features(bag))
        best = int(found.probabilities.argmax())
        rows.append((bag.name, bags.classes[bag.label], classes[best], *(f"{value:.6f}" for value in found.probabilities.tolist())))
        if bags.kind == "pictures" and i < SHEETS:
            said = f"{bag.name} ({bags.classes[bag.label]}): {classes[best]}, {float(found.probabilities[best]):.1%}"
            make_folder(work_dir / name)
            write_sheet(contact_sheet(bag, said, found), work_dir / name / f"{bags.classes[bag.label]}-{bag.name}.png")
    with replacing(work_dir / f"{name}.csv") as written, written.open("w", newline="") as file:
        csv.writer(file).writerows([("bag", "folder", "answer", *classes), *rows])
    if bags.kind == "pictures":
        print(f"{name}: wrote {name}.csv, and {min(SHEETS, len(chosen))} sheets of what it attends to, to {work_dir}", flush=True)


if __name__ == "__main__":
    run(main)
