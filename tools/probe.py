"""Trains heads on what a frozen network sees in your pictures, and compares them in one table.

The network computes its tokens once, which are kept in the work dir, so that what was interrupted goes on; heads then learn from them in
minutes: linear, attentive (efficient probing), SimPool, and of the class token where there is one. Each is written as a checkpoint.
"""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import csv
import sys
import time
from pathlib import Path

from zoo.files import replacing
from zoo.tools._cli import Parser, Progress, run

HEADS = ("linear", "attentive", "simpool", "class")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "vit_small_patch14_dinov2.lvd142m flowers/ --pretrained",
                    "work_dirs/digits/epoch_20.pth letters/ --heads linear attentive --queries 8")
    parser.add_argument("model", help="a network's name, of timm or the zoo, or a checkpoint that `zoo train` wrote")
    parser.add_argument("data", help="your own pictures with a class each: class folders, or a CSV of paths and labels")
    parser.add_argument("--work-dir", help="where to write tokens, heads and the table (default: work_dirs/probe_MODEL_DATA)")
    parser.add_argument("--weights", metavar="FILE", help="the network's weights: the authors', timm's or those of another run")
    parser.add_argument("--pretrained", action="store_true", help="the weights that timm downloads")
    parser.add_argument("--size", type=int, help="side of the pictures that the network sees, in pixels (default: its own)")
    parser.add_argument("--before-norm", action="store_true", help="tokens before the network's last norm, not after it")
    parser.add_argument("--heads", nargs="+", choices=HEADS, help="which to train (default: all that the network has tokens for)")
    parser.add_argument("--queries", type=int, metavar="N", help="of the attentive head (default: the most up to 32 that divide the width)")
    parser.add_argument("--epochs", type=int, default=50, help="of each head (default: 50)")
    parser.add_argument("--batch", type=int, default=64, help="pictures at once (default: 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--folds", type=int, metavar="K", help="divide data without a part for validation into K parts (default: 5)")
    parser.add_argument("--fold", type=int, default=0, metavar="I", help="which of them is for validation, from 0 (default: 0)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)

    import torch

    from zoo.probing.networks import open_network
    from zoo.probing.tokens import cached_tokens
    from zoo.probing.training import Recipe, heads_of, train_head, write_probe
    from zoo.reading.discovery import discover
    from zoo.reading.own_data import divided

    recipe = Recipe(args.epochs, args.batch, args.lr, args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, info, model_args, random = open_network(args.model, weights=args.weights, pretrained=args.pretrained, size=args.size,
                                                     seed=args.seed)
    poolings, queries = heads_of(network, args.heads, args.queries, not args.before_norm)
    data = divided(discover(args.data), args.folds, args.fold, args.seed)
    print(*data.described(), sep="\n", flush=True)
    if random:
        print(f"note: the weights of {info.name} are random; --pretrained or --weights gives others", file=sys.stderr, flush=True)
    work_dir = Path(args.work_dir or Path("work_dirs") / f"probe_{info.name}_{data.root.absolute().stem}")
    norm, started, show = not args.before_norm, time.monotonic(), Progress()
    tokens = cached_tokens(network.to(device), info, data, work_dir / "tokens", norm=norm, batch=args.batch,
                           progress=lambda part, done, of: show(f"tokens of pictures for {part}: {done}/{of}"))
    pictures = sum(map(len, tokens.values()))
    print(f"tokens of {pictures} pictures: {time.monotonic() - started:.1f} s, in {work_dir / 'tokens'}", flush=True)
    found = []
    for pooling in poolings:
        found.append(train_head(tokens, len(data.classes), pooling, queries, recipe, device,
                                lambda epoch, pooling=pooling: show(f"{pooling}: epoch {epoch}/{recipe.epochs}")))
        write_probe(found[-1], network.cpu(), info, data.classes, model_args, queries, norm, work_dir / f"{pooling}.pth")
    rows = [(trained.pooling, trained.parameters, round(trained.accuracy, 2), round(trained.seconds, 1)) for trained in found]
    with replacing(work_dir / "heads.csv") as written, written.open("w", newline="") as file:
        csv.writer(file).writerows([("head", "parameters", "accuracy", "seconds"), *rows])
    print(f"\n{'head':<10} {'parameters':>10} {'accuracy':>9} {'seconds':>8}")
    print(*(f"{head:<10} {parameters:>10} {accuracy:>7.2f} % {seconds:>8.1f}" for head, parameters, accuracy, seconds in rows), sep="\n")
    print(f"\nwrote {', '.join(f'{pooling}.pth' for pooling in poolings)} and heads.csv to {work_dir}")


if __name__ == "__main__":
    run(main)
