"""Pictures with text below them, side by side on sheets, and the files that results go to."""
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from PIL import Image, ImageDraw, ImageFont

from zoo.errors import InputError
from zoo.reading.pictures import PICTURE_SUFFIXES

TILE = 192  # pixels: the longer side of a picture on a contact sheet
SHEET_LIMIT = 400  # pictures


def annotate(picture: Image.Image, lines: Iterable[str], colors: Iterable[tuple[int, int, int]] = ()) -> Image.Image:
    """`picture` with `lines` of text below it, in `colors` or black, enlarged to a readable width if it is small."""
    factor = max(1, math.ceil(TILE / max(picture.size)))
    picture = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    font = cast(ImageFont.FreeTypeFont, ImageFont.load_default(max(14, picture.width // 40)))  # what has a size
    lines = list(lines)
    step = round(font.size * 1.4)
    width = max([picture.width, *(math.ceil(font.getlength(line)) + 8 for line in lines)])
    result = Image.new("RGB", (width, picture.height + step * len(lines) + 4), "white")
    result.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(result)
    for i, (line, color) in enumerate(itertools.zip_longest(lines, colors, fillvalue="black")):
        draw.text((4, picture.height + 2 + i * step), line, fill=color, font=font)
    return result


def contact_sheet(tiles: list[Image.Image]) -> Image.Image:
    """`tiles` side by side in rows, on a grid that is about square."""
    columns = math.ceil(math.sqrt(len(tiles)))
    width, height = max(tile.width for tile in tiles) + 4, max(tile.height for tile in tiles) + 4
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def output_files(pictures: list[Path], output: str | Path, suffixes: tuple[str, ...] = PICTURE_SUFFIXES, ending: str = ".png",
                 ) -> list[Path]:
    """The files that are written for `pictures`: `output` itself where it ends in `suffixes`, otherwise files below that folder.

    Those are named after the pictures, with `ending`. Raises InputError if it cannot or should not be written.
    """
    output = Path(output)
    if not output.parent.is_dir():
        raise InputError(f"cannot write {output}: there is no folder {output.parent}")
    if output.name.lower().endswith(suffixes) and not output.is_dir():
        if len(pictures) > SHEET_LIMIT:
            raise InputError(f"{len(pictures)} pictures are too many for one file ({SHEET_LIMIT} fit); give a folder instead of {output}")
        targets = [output]
    elif output.exists() and not output.is_dir():
        raise InputError(f"{output} is neither a folder nor the name of a file to write ({' '.join(suffixes)})")
    else:
        targets = []
        for picture in pictures:
            stem = picture.name.removesuffix(".gz").rpartition(".")[0] or picture.name
            names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
            targets.append(next(target for name in names if (target := output / f"{name}{ending}") not in targets))
    inputs = {picture.resolve() for picture in pictures}
    for target in targets:
        if target.resolve() in inputs:
            raise InputError(f"{target} is one of the pictures given and would be overwritten; choose another output")
    return targets
