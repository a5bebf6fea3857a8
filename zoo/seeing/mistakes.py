"""Pictures of what a model got wrong: masks and boxes beside those that are right."""
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LIMIT = 320  # pixels of the longer side; the pages stay small
Colour = tuple[int, int, int]
Picture = tuple[str, Image.Image]  # what it shows, and itself

MISSED, FALSE, CONFUSED, RIGHT = (255, 176, 0), (220, 38, 127), (120, 94, 240), (60, 150, 255)  # told apart by the colour-blind too
DIFFERENCES = {"missed: given, and not answered": MISSED, "false: answered, and not given": FALSE, "answered as another class": CONFUSED}
BOXES = {"missed: given, and not found (dashed)": MISSED, "false: found, and not given (thick)": FALSE, "found and given": RIGHT}


def fitted(picture: Image.Image, limit: int = LIMIT) -> Image.Image:
    """The picture in RGB, made smaller where a side is longer than `limit`."""
    picture = picture.convert("RGB")
    picture.thumbnail((limit, limit), Image.Resampling.BILINEAR)
    return picture


def masks(picture: Image.Image, target: np.ndarray, answer: np.ndarray, colours: np.ndarray, *, background: bool = True,
          ) -> list[Picture]:
    """The picture, the mask that is right, the one that was answered, and where they differ.

    Args:
        target, answer: class indices (H, W); targets that are no class are not covered, and not compared.
        colours: (classes, 3).
        background: whether class 0 is the background, which is not covered.
    """
    picture = fitted(picture)
    target, answer = (np.asarray(Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST))
                      for labels in (target.astype(np.int32), answer.astype(np.int32)))
    labelled = (target >= 0) & (target < len(colours))
    answer = np.where(labelled, answer, -1)
    there = [labelled & (labels >= int(background)) for labels in (target, answer)]
    wrong = labelled & (target != answer)
    difference = np.asarray(picture.convert("L").convert("RGB")) // 2
    for where, colour in ((there[0] & ~there[1], MISSED), (there[1] & ~there[0], FALSE), (there[0] & there[1], CONFUSED)):
        difference = np.where((wrong & where)[..., None], np.array(colour, np.uint8), difference)
    covered = [_covered(picture, labels, where, colours) for labels, where in zip((target, answer), there, strict=True)]
    return [("picture", picture), ("given", covered[0]), ("answer", covered[1]), ("difference", Image.fromarray(difference))]


def _covered(picture: Image.Image, labels: np.ndarray, where: np.ndarray, colours: np.ndarray) -> Image.Image:
    pixels = np.asarray(picture).astype(np.float32)
    over = colours[np.where(where, labels, 0)].astype(np.float32)
    return Image.fromarray(np.where(where[..., None], 0.4 * pixels + 0.6 * over, pixels).astype(np.uint8))


def boxes(picture: Image.Image, drawn: Sequence[tuple[Sequence[float], str, Colour]], limit: int = 480) -> Image.Image:
    """The picture with boxes (left, top, right, bottom), each with a text and one of the colours of `BOXES`."""
    shown = fitted(picture, limit)
    factor = max(1, math.ceil(limit / 2 / max(shown.size)))  # so that texts can be read
    shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    scale = shown.width / picture.width
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(12)
    for edges, text, colour in drawn:
        left, top, right, bottom = (scale * edge for edge in edges)
        if colour == MISSED:
            _dashed(pen, (left, top, right, bottom), colour)
        else:
            pen.rectangle((left, top, right, bottom), outline=colour, width=3 if colour == FALSE else 1)
        room = pen.textbbox((left, top), text, font=font)
        at = (min(left, shown.width - (room[2] - left) - 2), top - 14 if top >= 14 else min(bottom, shown.height - 14))
        pen.rectangle(pen.textbbox(at, text, font=font), fill=(0, 0, 0))
        pen.text(at, text, fill=colour, font=font)
    return shown


def _dashed(pen: ImageDraw.ImageDraw, edges: tuple[float, float, float, float], colour: Colour, dash: int = 6) -> None:
    left, top, right, bottom = edges
    for start, end in (((left, top), (right, top)), ((left, bottom), (right, bottom)), ((left, top), (left, bottom)),
                       ((right, top), (right, bottom))):
        steps = max(1, round(math.dist(start, end) / dash))
        points = [tuple(a + (b - a) * i / steps for a, b in zip(start, end, strict=True)) for i in range(steps + 1)]
        for i in range(0, steps, 2):
            pen.line([points[i], points[i + 1]], fill=colour, width=3)
