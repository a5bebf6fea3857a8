"""Classes of pictures, with probabilities, and pictures annotated with them."""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.predicting.answers import Answers, Failed, stop
from zoo.predicting.sheets import TILE, annotate
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
    return list(predict_each(model, info, paths, top=top, batch=batch, progress=progress))


def predict_each(model: nn.Module, info: ModelInfo, paths: Iterable[str | Path], *, top: int = 5, batch: int = 32,
                 progress: Callable[[int], None] = lambda done: None, failed: Failed = stop) -> Iterator[Prediction]:
    """As `predict`, one after the other. What `failed` is called with, the path of a picture that cannot be read and why, is left out."""
    if top < 1 or batch < 1:
        raise InputError(f"{top} classes in batches of {batch} were asked for; both have to be at least 1")
    files = list(map(Path, paths))
    transform = cast(Callable[[Image.Image], Tensor], timm.data.create_transform(**info.data_config, is_training=False))
    device = next((parameter.device for parameter in model.parameters()), "cpu")
    for start in range(0, len(files), batch):
        images = []
        for path in files[start:start + batch]:
            try:
                images.append((path, transform(open_picture(path, info.input_size[0]))))
            except InputError as error:
                failed(path, error)
        if images:
            with torch.inference_mode():
                probabilities = model(torch.stack([image for _, image in images]).to(device)).float().softmax(dim=-1).cpu()
            best = probabilities.topk(min(top, probabilities.shape[-1]))
            for (path, _), values, indices in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
                yield Prediction(path, tuple((info.class_name(index), value) for index, value in zip(indices, values, strict=True)))
        progress(min(start + batch, len(files)))


class ClassAnswers(Answers):
    """The most probable classes of pictures: a table of them, the pictures with the first three below, or a contact sheet."""

    columns = ("picture", "rank", "class", "probability")

    def flat(self, answer: Prediction) -> list[dict]:
        return [{"picture": str(answer.path), "rank": rank, "class": name, "probability": round(probability, 6)}
                for rank, (name, probability) in enumerate(answer.classes, 1)]

    def save(self, answer: Prediction, ending: str, path: Path) -> None:
        _annotated(answer, None).save(path)

    def tile(self, answer: Prediction) -> Image.Image:
        return _annotated(answer, TILE)


def write_annotated(predictions: list[Prediction], output: str | Path) -> list[Path]:
    """Writes what was predicted, as `zoo.predicting.answers.Answers` has it: tables, pictures, a contact sheet; returns the paths."""
    answers = ClassAnswers([prediction.path for prediction in predictions], output)
    for prediction in predictions:
        answers.add(prediction)
    return answers.close()


def _annotated(prediction: Prediction, limit: int | None) -> Image.Image:
    picture = open_picture(prediction.path)
    if limit is not None and max(picture.size) > limit:
        picture.thumbnail((limit, limit))
    return annotate(picture, [prediction.path.name, *(f"{name}  {value:.1%}" for name, value in prediction.classes[:3])])
