"""Writes the table of models, generated from the registry, into a Markdown file."""
import argparse
from pathlib import Path

from zoo.cli import run
from zoo.model_table import replace_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/model_table.py README.md")
    parser.add_argument("file", type=Path, help="a Markdown file with the marks of the table")
    args = parser.parse_args()
    replace_table(args.file)
    print(f"wrote the table of models to {args.file}")


if __name__ == "__main__":
    run(main)
