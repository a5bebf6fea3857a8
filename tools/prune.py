"""Takes what matters least on your pictures, attention or heads, out of a vision transformer, and writes a checkpoint."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import InputError
from zoo.files import check_writable
from zoo.tools._cli import Parser, run

if TYPE_CHECKING:
    from zoo.attention_removal import Choice


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "work_dirs/digits/epoch_30.pth pictures/ --attention 2 -o pruned.pth",
                    "work_dirs/digits/epoch_30.pth pictures/ --heads 0.25 -o pruned.pth",
                    "deit_tiny_patch16_224 imagenet/val --pretrained --attention 3 -o pruned.pth")
    parser.add_argument("model", help="a checkpoint that `zoo train` wrote; or a registered model's name, with --weights or --pretrained")
    parser.add_argument("data", help="folder of pictures; those in folders named after classes are labelled, which --heads needs")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--attention", type=int, metavar="N", help="of N blocks, those of least transfer entropy (arXiv 2404.05657); it "
                      "fades out as the checkpoint is trained on")
    what.add_argument("--heads", type=float, metavar="SHARE", help="the share of all heads of least importance (arXiv 1905.10650), at once")
    parser.add_argument("--at-once", action="store_true", help="attention is gone from the checkpoint, and does not fade out")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--weights", metavar="FILE", help="those of the model that is named: the authors' or timm's")
    parser.add_argument("--pretrained", action="store_true", help="those that timm downloads")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default: 32)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)

    from zoo import pruning

    if args.at_once and args.attention is None:
        raise InputError("--at-once is for --attention; heads are always taken out at once")
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: it is above 0")
    if args.output.suffix not in (".pth", ".pt"):
        raise InputError(f"{args.output} is no name of a checkpoint; it has to end in .pth")
    check_writable(args.output)
    network = pruning.load(args.model, args.weights, args.pretrained)
    pictures = pruning.Pictures(args.data, network.info, args.batch, show)
    labelled = any(label >= 0 for label in pictures.labels)
    before = network.parameters, pruning.accuracy(network, pictures.labelled()) if labelled else None
    if args.attention is None:
        removed = pruning.prune_share_of_heads(network, pictures, args.heads)
        for layer, heads in removed.items():
            print(f"{layer}: heads {', '.join(map(str, heads))} are gone")
    else:
        choices = pruning.prune_attention(network, pictures, args.attention, args.at_once)
        show_entropies(choices)
    after = network.parameters, pruning.accuracy(network, pictures) if labelled else None
    print(f"parameters: {before[0] / 1e6:.2f} M, {after[0] / 1e6:.2f} M afterwards")
    if labelled:
        print(f"accuracy on these pictures: {before[1]:.2f} %, {after[1]:.2f} % afterwards")
    pruning.write(network, args.output)
    print(f"wrote {args.output}")
    fades = "; attention fades out of it" if args.attention is not None and not args.at_once else ""
    print(f"to train it on{fades}: zoo train {network.info.name} DATA --weights {args.output}")


def show_entropies(choices: "list[Choice]") -> None:
    """A column for every choice, in which the block that was chosen is marked."""
    print("transfer entropy of the logits in bits, of each block without its attention, and of those chosen before")
    print("block", *(f"{f'choice {number}':>10}" for number in range(1, len(choices) + 1)))
    for block in choices[0].entropies:
        left = [choice for choice in choices if block in choice.entropies]
        cells = [f"{choice.entropies[block]:.2f}{'*' if block == choice.block else ' '}" for choice in left]
        print(f"{block:>5}", *(f"{cell:>10}" for cell in cells))
    print(f"chosen, in this order: {', '.join(str(choice.block) for choice in choices)}")


def show(done: int, total: int) -> None:
    """One line that counts, on a terminal."""
    if sys.stderr.isatty():
        print(f"\rbatch {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
