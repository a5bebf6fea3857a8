"""Writes a table of models, generated from the registry and from what is measured in benchmarks/, into a Markdown file."""
import argparse
from pathlib import Path

from zoo.measuring.model_table import listed, replace_table, table, whole_table
from zoo.tools._cli import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_table", description=__doc__,
                                     epilog="example: python -m benchmarks.model_table docs/models.md --whole")
    parser.add_argument("file", type=Path, help="a Markdown file with the marks of the table")
    parser.add_argument("--whole", action="store_true", help="all that is known, not only what the README has room for")
    args = parser.parse_args()
    replace_table(args.file, (whole_table if args.whole else table)(listed()))
    print(f"wrote the table of models to {args.file}")


if __name__ == "__main__":
    run(main)
