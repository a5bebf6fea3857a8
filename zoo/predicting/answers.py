"""Where answers go, and in which form: a table, a picture or mask, or a folder of these."""
import csv
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from zoo.errors import InputError
from zoo.files import check_writable, make_folder, replacing
from zoo.predicting.sheets import contact_sheet
from zoo.reading.pictures import PICTURE_SUFFIXES

TABLES = (".csv", ".json")
SHEET_LIMIT = 400  # pictures


Failed = Callable[[Path, InputError], None]


def stop(path: Path, error: InputError) -> None:
    """What is done about a file that cannot be read, where nobody says otherwise."""
    raise error


def output_suffix(output: str | Path, suffixes: Sequence[str]) -> str:
    """Which of `suffixes` the file `output` has, or "" if `output` names a folder: one that is there, or a name without a suffix.

    Raises InputError for any other name.
    """
    name = os.path.basename(output)
    if os.path.isdir(output) or not name:  # which it is before a slash at the end
        return ""
    known = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")
    if not known and (Path(name).suffix or os.path.exists(output)):
        files = f"a file to write here ({' '.join(suffixes)})" if suffixes else "one to be made"
        raise InputError(f"{output} is neither a folder nor the name of {files}; the name of a new folder has no suffix, or a / behind it")
    return known


def output_files(inputs: Sequence[Path], folder: str | Path, endings: Sequence[str] = (".png",)) -> list[tuple[Path, ...]]:
    """For each of `inputs` files in `folder` that are named after it, one with each of `endings`. No two are the same."""
    taken: set[Path] = set()
    found = []
    for path in inputs:
        stem = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
        names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
        targets = next(targets for name in names
                       if taken.isdisjoint(targets := tuple(Path(folder) / f"{name}{ending}" for ending in endings)))
        taken.update(targets)
        found.append(targets)
    return found


def check_keeps_inputs(inputs: Iterable[Path], targets: Iterable[Path]) -> None:
    """Raises InputError if one of `targets` is one of `inputs`."""
    given = {path.resolve() for path in inputs}
    for target in targets:
        if target.resolve() in given:
            raise InputError(f"{target} is one of the files given and would be overwritten; choose another output")


class Answers:
    """Writes what a network says of files, one answer after the other, to `output`.

    A name that ends in .csv or .json is a table of all answers; a name with one of `suffixes` is one file; any other is a folder,
    which is made, with files for every answer and the table. Subclasses, of which there is one for each kind of answers, say what
    is in them. A file is there whole or not at all.

    Args:
        inputs: the files that are answered for.
        output: the file or folder.

    Raises InputError if `output` cannot or should not be written: before the work whose results go there.
    """

    columns: tuple[str, ...]  # of the table
    table = "answers.csv"  # in a folder
    suffixes: tuple[str, ...] = PICTURE_SUFFIXES
    endings: tuple[str, ...] = (".png",)  # of an answer's files
    one_sheet = True  # whether several answers fit into one picture

    def __init__(self, inputs: Sequence[Path], output: str | Path):
        self.output = Path(output)
        self.suffix = output_suffix(output, (*TABLES, *self.suffixes))
        self.targets: dict[Path, tuple[Path, ...]] = {}
        if self.suffix == "":
            self.targets = dict(zip(inputs, output_files(inputs, self.output, self.endings), strict=True))
        elif self.suffix not in TABLES:
            self._check_one_file(inputs)
            stem = self.output.name[: -len(self.suffix)]
            others = tuple(self.output.with_name(f"{stem}{ending}") for ending in self.endings[1:])
            self.targets = dict.fromkeys(inputs, (self.output, *others))
        files = {target for targets in self.targets.values() for target in targets} or {self._table()}
        check_keeps_inputs(inputs, files)
        if not self.output.parent.is_dir():
            raise InputError(f"cannot write {output}: there is no folder {self.output.parent}")
        make_folder(self.output if os.path.isdir(self.output) else self.output.parent)  # which says whether it can be written to
        for target in files if self.suffix else ():
            check_writable(target)
        self.sheet = len(inputs) > 1 and self.suffix not in ("", *TABLES)
        self.tiles: list[Image.Image] = []
        self.rows: list[dict[str, Any]] = []
        self.written: dict[Path, None] = {}

    def _check_one_file(self, inputs: Sequence[Path]) -> None:
        limit = SHEET_LIMIT if self.one_sheet else 1
        if len(inputs) > limit:
            raise InputError(f"{len(inputs)} answers are too many for one file ({limit} fit{'s' * (limit == 1)}); "
                             f"give a folder instead of {self.output}")

    def add(self, answer: Any) -> None:
        """Takes one answer, and writes its files."""
        if self.sheet:
            self.tiles.append(self.tile(answer))
            return
        if self.suffix == "":
            make_folder(self.output)
        for ending, target in zip(self.endings, self.targets.get(answer.path, ()), strict=False):
            with replacing(target) as written:
                self.save(answer, ending, written)
            self.written[target] = None
        self.rows += self.records(answer) if self._table().suffix.lower() == ".json" else self.flat(answer)

    def close(self) -> list[Path]:
        """Writes what holds all answers, and returns all files that were written."""
        if self.sheet and self.tiles:
            with replacing(self.output) as written:
                contact_sheet(self.tiles).save(written)
            self.written[self.output] = None
        elif self.suffix in ("", *TABLES):
            if self.suffix == "":
                make_folder(self.output)
            with replacing(self._table()) as written:
                self._write_table(written)
            self.written[self._table()] = None
        return list(self.written)

    def _table(self) -> Path:
        return self.output if self.suffix in TABLES else self.output / self.table

    def _write_table(self, path: Path) -> None:
        if path.suffix.lower() == ".json":
            path.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, self.columns, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)

    def flat(self, answer: Any) -> list[dict[str, Any]]:
        """The rows of the answer in a CSV file, by column."""
        raise NotImplementedError

    def records(self, answer: Any) -> list[dict[str, Any]]:
        """What JSON has of the answer."""
        return self.flat(answer)

    def save(self, answer: Any, ending: str, path: Path) -> None:
        """Writes that one of the answer's files that has this ending."""
        raise NotImplementedError

    def tile(self, answer: Any) -> Image.Image:
        """The answer as a part of a sheet."""
        raise NotImplementedError
