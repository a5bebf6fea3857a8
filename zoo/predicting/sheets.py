"""Pictures with text below them, and side by side on sheets."""
import itertools
import math
from collections.abc import Iterable
from typing import cast

from PIL import Image, ImageDraw, ImageFont

TILE = 192  # pixels: the longer side of a picture on a contact sheet


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
