"""Contact sheets: the pictures of a bag that a head attends to most."""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zoo.bags.training import Answer
from zoo.files import replacing
from zoo.reading.bags import Bag
from zoo.reading.pictures import open_picture

COLUMNS, TILE, TEXT, GAP = 6, 112, 18, 6


def contact_sheet(bag: Bag, said: str, answer: Answer, most: int = 24) -> Image.Image:
    """Up to `most` pictures, those of most attention first, each with its share and a bar of it against the largest; above them `said`."""
    order = answer.attention.argsort(descending=True, stable=True)[:most].tolist()
    columns = min(COLUMNS, len(order))
    rows = -(-len(order) // columns)
    width = max(columns * (TILE + GAP) + GAP, 6 * len(said) + 2 * GAP)
    sheet = Image.new("RGB", (width, rows * (TILE + TEXT + GAP) + GAP + 2 * TEXT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((GAP, GAP), said, "black", font)
    largest = float(answer.attention.max())
    for place, i in enumerate(order):
        x, y = GAP + place % columns * (TILE + GAP), 2 * TEXT + place // columns * (TILE + TEXT + GAP)
        picture = open_picture(bag.files[i], 3)
        factor = TILE / max(picture.size)
        small = picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))),
                               Image.Resampling.NEAREST if factor > 2 else Image.Resampling.LANCZOS)
        sheet.paste(small, (x + (TILE - small.width) // 2, y + (TILE - small.height) // 2))
        share = float(answer.attention[i])
        draw.rectangle((x, y + TILE + 2, x + round(TILE * share / largest), y + TILE + TEXT - 2), "#f9b24e")
        draw.text((x + 2, y + TILE), f"{100 * share:.1f} %", "black", font)
    return sheet


def write_sheet(sheet: Image.Image, path: Path) -> None:
    with replacing(path) as written:
        sheet.save(written, "PNG")
