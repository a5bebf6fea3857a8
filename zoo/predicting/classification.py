"""Classes of pictures, with probabilities, and pictures annotated with them."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.files import replacing
from zoo.predicting.sheets import TILE, annotate, contact_sheet, output_files
from zoo.reading.pictures import open_picture


@dataclass(frozen=True)
class Prediction:
    """A picture's most probable classes, best first, as pairs (name, probability)."""

    path: Path
    classes: tuple[tuple[str, float], ...]


def predict(model: nn.Module, info: ModelInfo, paths: Iterable[str | Path], *, top: int = 5, batch: int = 32,
            progress: Callable[[int], None] = lambda done: None) -> list[Prediction]:
    """The `top` most probable classes of each picture, through the preprocessing the model was evaluated with.

    Runs `batch` pictures at once where the parameters of `model` are; `progress` is called with the number done.
    """
    if top < 1 or batch < 1:
        raise InputError(f"{top} classes in batches of {batch} were asked for; both have to be at least 1")
    files = list(map(Path, paths))
    transform = cast(Callable[[Image.Image], Tensor], timm.data.create_transform(**info.data_config, is_training=False))
    device = next(model.parameters()).device
    predictions = []
    for start in range(0, len(files), batch):
        chunk = files[start:start + batch]
        images = torch.stack([transform(open_picture(path, info.input_size[0])) for path in chunk])
        with torch.inference_mode():
            probabilities = model(images.to(device)).float().softmax(dim=-1).cpu()
        best = probabilities.topk(min(top, probabilities.shape[-1]))
        for path, values, indices in zip(chunk, best.values.tolist(), best.indices.tolist(), strict=True):
            named = tuple((info.class_name(index), value) for index, value in zip(indices, values, strict=True))
            predictions.append(Prediction(path, named))
        progress(len(predictions))
    return predictions


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


def _annotated(prediction: Prediction, limit: int | None) -> Image.Image:
    picture = open_picture(prediction.path)
    if limit is not None and max(picture.size) > limit:
        picture.thumbnail((limit, limit))
    return annotate(picture, [prediction.path.name, *(f"{name}  {value:.1%}" for name, value in prediction.classes[:3])])
