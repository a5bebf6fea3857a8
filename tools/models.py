"""Lists the models: names, or all that is known about them."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse

from zoo.errors import InputError, near_misses
from zoo.tools._cli import Parser, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "'*_tiny'", "--mechanism routing --details")
    parser.add_argument("pattern", nargs="?", default="*", help="a name, or a pattern such as '*_nano' (default: all)")
    parser.add_argument("--mechanism", help="only models built on this one, such as routing")
    parser.add_argument("--details", action="store_true",
                        help="also mechanism, parameters, multiply-accumulates, input size, the top-1 accuracy on ImageNet-1k that the "
                             "authors report, the licence of their weights, and the paper; takes up to a second a model")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)

    from zoo.models import list_models

    names = list_models(args.pattern, args.mechanism)
    if not names:
        of = f" of the mechanism {args.mechanism}" if args.mechanism else ""
        raise InputError(f"no model{of} matches {args.pattern!r}{near_misses(args.pattern, list_models(mechanism=args.mechanism))}")
    if not args.details:
        print(*names, sep="\n")
        return

    from zoo.measuring.model_table import DETAILS, details

    widths = [max(map(len, names)), *(len(head) + 2 for head in DETAILS[1:])]
    for row in (DETAILS, *map(details, names)):
        print(*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)), sep="  ", flush=True)


if __name__ == "__main__":
    run(main)
