"""Writes the tables of mechanisms and models into Markdown files that have a place for them."""
import argparse
from pathlib import Path

from zoo.measuring.model_table import write_tables
from zoo.tools._cli import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_table", description=__doc__,
                                     epilog="example: python -m benchmarks.model_table README.md docs/models.md")
    parser.add_argument("files", nargs="+", type=Path, metavar="file", help="a Markdown file with the marks of a table")
    for path in parser.parse_args().files:
        print(f"{path}: wrote the table of {' and '.join(write_tables(path))}")


if __name__ == "__main__":
    run(main)
