"""Writes report.html into the work dir of a training: curves, what every class gets, the worst mistakes."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse

from zoo.tools._cli import Parser, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "work_dirs/digits", "work_dirs/digits --checkpoint work_dirs/digits/epoch_20.pth")
    parser.add_argument("work_dir", help="where `zoo train` wrote")
    parser.add_argument("--checkpoint", help="what to evaluate on the validation data (default: the best that training kept, or else the "
                                             "newest)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)

    from zoo.mm.report import write_report

    print(f"wrote {write_report(args.work_dir, args.checkpoint)}")


if __name__ == "__main__":
    run(main)
