"""Classes of pictures, with probabilities, and pictures annotated with them."""
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError, near_misses
from zoo.files import replacing

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TILE = 192  # pixels: the longer side of a picture on a contact sheet
SHEET_LIMIT = 400  # pictures


@dataclass(frozen=True)
class Prediction:
    """A picture's most probable classes, best first, as pairs (name, probability)."""

    path: Path
    classes: tuple[tuple[str, float], ...]


def find_pictures(inputs: Iterable[str | Path]) -> list[Path]:
    """The files among `inputs` and the pictures below the folders among them. Raises InputError if there are none."""
    found = []
    for given in map(Path, inputs):
        if given.is_dir():
            below = sorted(path for path in given.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
            if not below:
                raise InputError(f"the folder {given} holds no picture ({' '.join(PICTURE_SUFFIXES)})")
            found += below
        elif given.exists():
            found.append(given)
        else:
            others = [other.name for other in given.parent.iterdir()] if given.parent.is_dir() else []
            raise InputError(f"there is no picture {given}{near_misses(given.name, others)}")
    return found


def open_picture(path: str | Path, channels: int = 3) -> Image.Image:
    """The picture at `path`, turned upright as its EXIF data say, in 8 bits: RGB, or grey for one channel.

    Integers of more than 8 bits count as 16 bits, 65535 being white; of floats, 1 is white.

    Raises InputError for a file that is not a picture, a damaged one, and one with values beyond these.
    """
    if channels not in (1, 3):
        raise InputError(f"the model takes images of {channels} channels; pictures have 1 or 3")
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow would clip to 255
                picture = _in_8_bits(picture)
            return picture.convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture that can be read") from None
    except Exception as error:  # a damaged file surfaces as whatever its decoder stumbles over
        raise InputError(f"the picture {path} cannot be read: {error}") from error


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey, of integers of 16 bits or floats from 0 to 1. Raises ValueError for other values: nothing says which of them is white."""
    values, white = np.asarray(picture), 1 if picture.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # written so that NaN is refused
        raise ValueError(f"its values go from {low:g} to {high:g}, where integers of 8 or 16 bits or floats from 0 to 1 are needed")
    return Image.fromarray(((values * 255).round() if white == 1 else values // 257).astype(np.uint8))


def picture_tensor(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(C, H, W): pixels between 0 and 1, less the mean of their channel, over its standard deviation."""
    pixels = np.asarray(picture, np.float32).reshape(picture.height, picture.width, len(mean)) / 255
    return torch.from_numpy((pixels - np.array(mean, np.float32)) / np.array(std, np.float32)).permute(2, 0, 1).contiguous()


def predict(model: nn.Module, info: ModelInfo, paths: Iterable[str | Path], *, top: int = 5, batch: int = 32,
            progress: Callable[[int], None] = lambda done: None) -> list[Prediction]:
    """The `top` most probable classes of each picture, through the preprocessing the model was evaluated with.

    Runs `batch` pictures at once where the parameters of `model` are; `progress` is called with the number done.
    """
    if top < 1 or batch < 1:
        raise InputError(f"{top} classes in batches of {batch} were asked for; both have to be at least 1")
    paths = list(map(Path, paths))
    transform = timm.data.create_transform(**info.data_config, is_training=False)
    device = next(model.parameters()).device
    predictions = []
    for start in range(0, len(paths), batch):
        chunk = paths[start:start + batch]
        images = torch.stack([transform(open_picture(path, info.input_size[0])) for path in chunk])
        with torch.inference_mode():
            probabilities = model(images.to(device)).float().softmax(dim=-1).cpu()
        best = probabilities.topk(min(top, probabilities.shape[-1]))
        for path, values, indices in zip(chunk, best.values.tolist(), best.indices.tolist(), strict=True):
            named = tuple((class_name(info, index), value) for index, value in zip(indices, values, strict=True))
            predictions.append(Prediction(path, named))
        progress(len(predictions))
    return predictions


def annotate(picture: Image.Image, lines: Iterable[str], colors: Iterable[tuple[int, int, int]] = ()) -> Image.Image:
    """`picture` with `lines` of text below it, in `colors` or black, enlarged to a readable width if it is small."""
    factor = max(1, math.ceil(TILE / max(picture.size)))
    picture = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    font = ImageFont.load_default(max(14, picture.width // 40))
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


def write_annotated(predictions: list[Prediction], output: str | Path) -> list[Path]:
    """Writes the pictures with what was predicted and returns the written paths.

    `output` with a picture's suffix is one file: the picture, or a contact sheet of several. Any other `output` is
    a folder, which is made, with a PNG for each picture.
    """
    targets = output_files([prediction.path for prediction in predictions], output)
    if len(targets) == 1 and targets[0] == Path(output):
        tiles = [_annotated(prediction, None if len(predictions) == 1 else TILE) for prediction in predictions]
        with replacing(targets[0]) as written:
            (tiles[0] if len(tiles) == 1 else contact_sheet(tiles)).save(written)
        return targets
    Path(output).mkdir(exist_ok=True)
    for prediction, target in zip(predictions, targets, strict=True):
        with replacing(target) as written:
            _annotated(prediction, None).save(written)
    return targets


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


def class_name(info: ModelInfo, index: int) -> str:
    return str(info.classes[index]) if index < len(info.classes) else f"class {index}"


def _annotated(prediction: Prediction, limit: int | None) -> Image.Image:
    picture = open_picture(prediction.path)
    if limit is not None and max(picture.size) > limit:
        picture.thumbnail((limit, limit))
    return annotate(picture, [prediction.path.name, *(f"{name}  {value:.1%}" for name, value in prediction.classes[:3])])
