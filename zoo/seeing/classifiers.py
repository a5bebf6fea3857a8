"""What a classifier attends to: a picture of its mechanism for every stage, and attributions of its answer."""
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

import zoo.layers
from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.reading.pictures import open_picture
from zoo.seeing.attention import Layer, collect
from zoo.seeing.attributions import class_sensitivity, heat, undisturbed
from zoo.seeing.figures import new_figure, overlay, render
from zoo.seeing.mechanism_pictures import COLOURS, PICTURES, Captured, Point
from zoo.seeing.page import Seen

LIKELY = 0.01  # probability of a class that is worth naming
CHANNELS_LAST = {zoo.layers.BiLevelRoutingAttention, zoo.layers.HiLoAttention, zoo.layers.MixtureOfHeads, zoo.layers.SelectiveScan2d,
                 zoo.layers.TokenAwareAvgPool}


def mechanisms(model: nn.Module, info: ModelInfo, picture: Image.Image, query: Point = (0.5, 0.5)) -> list[Seen]:
    """What the layers of `model` did with `picture`: the last layer of every stage.

    Args:
        query: where the attention comes from whose targets are shown, as fractions of height and width of what the model sees.

    Raises:
        InputError: a query outside the picture, or a model whose layers report nothing.
    """
    if not all(0 <= fraction < 1 for fraction in query):
        raise InputError(f"the query is at least 0 and less than 1, as a fraction of height and width; got {query[0]:g} {query[1]:g}")
    image, shown = _prepare(info, picture)
    with _sizes(model) as sizes, torch.inference_mode(), zoo.layers.capture(model) as maps:
        model(image)
    modules = dict(model.named_modules())
    drawn = {name: found for name, found in maps.items() if type(modules[name]) in PICTURES}
    if not drawn:
        known = ", ".join(kind.__name__ for kind in PICTURES)
        raise InputError(f"{info.name} has no layer with a picture of its own; {known} have")
    # Layers that report maps of the same shapes are one stage.
    stages = {(type(modules[name]), *(value.shape for value in found.values())): name for name, found in drawn.items()}
    seen = []
    for name in stages.values():
        captured = Captured(name, modules[name], {key: value[0] for key, value in drawn[name].items()},
                            sizes.get(name, shown.shape[:2]), shown)
        figure, caption = PICTURES[type(modules[name])](captured, query)
        kind = type(modules[name])
        seen.append(Seen(name.replace(".", "-"), f"{name}: {kind.__name__}", caption, render(figure), COLOURS[kind]))
    return seen


def attribution(model: nn.Module, info: ModelInfo, picture: Image.Image, method: str, target: int | None = None) -> Seen:
    """Which pixels speak for class number `target` (default: the most probable one), by a method of `zoo.seeing.attributions.heat`.

    Raises:
        InputError: an unknown method or class, or a model that the method does not suit.
    """
    image, shown = _prepare(info, picture)
    with undisturbed(model), torch.inference_mode():
        logits = model(image)[0]
    if logits.ndim != 1:
        raise InputError(f"{info.name} gives maps; attributions explain the classes of whole pictures")
    target = int(logits.argmax()) if target is None else target
    check_target(target, len(logits))
    figure, (left, right) = new_figure(2)
    left.imshow(shown)
    most, least = int(logits.argmax()), int(logits.argmin())
    heats = {of: heat(model, image, of, method) for of in {target, most, least}}
    overlay(right, shown, heats[target], (-0.5, shown.shape[1] - 0.5, shown.shape[0] - 0.5, -0.5))
    caption = f"The picture, and how much each place speaks for {_answer(info, logits.softmax(0), target)}."
    alike = class_sensitivity(heats[most], heats[least])
    if most != least and math.isfinite(alike):
        caption += (f" The heat of the most and of the least probable class correlate by {alike:.2f}: near 1 it shows what is in the "
                    "picture rather than what speaks for a class.")
    return Seen(method, method.replace("_", " "), caption, render(figure), ("heat",))


def attention(model: nn.Module, info: ModelInfo, path: Path) -> tuple[Image.Image, list[Layer]]:
    """What the model sees of a picture, and the attention of its layers, see `zoo.seeing.attention.collect`."""
    image, shown = _prepare(info, open_picture(path, info.input_size[0]))
    return Image.fromarray((255 * shown).round().astype(np.uint8)), collect(model, image)


def _answer(info: ModelInfo, probabilities: Tensor, target: int) -> str:
    """The class with its probability, and the likeliest others."""
    best = probabilities.topk(min(4, len(probabilities)))
    others = [f"{info.class_name(index)} {value:.1%}" for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
              if index != target and value >= LIKELY][:3]
    said = f"{info.class_name(target)}, {probabilities[target]:.1%} probable"
    if best.values[0] < LIKELY:
        return f"{said}: no class of {len(probabilities)} has as much as {LIKELY:.0%}"
    return f"{said}; other classes: {', '.join(others)}" if others else said


def check_target(target: int, classes: int) -> None:
    """Raises InputError unless `target` is the number of one of so many classes."""
    if not 0 <= target < classes:
        raise InputError(f"the target is a class number from 0 to {classes - 1}, got {target}")


def _prepare(info: ModelInfo, picture: Image.Image) -> tuple[Tensor, np.ndarray]:
    """The input of the model, (1, C, H, W), and what can be seen of it, (H, W, 3) from 0 to 1."""
    transform = cast(Callable[[Image.Image], Tensor], timm.data.create_transform(**info.data_config, is_training=False))
    image = transform(picture)
    mean, std = (torch.tensor(info.data_config[key])[:, None, None] for key in ("mean", "std"))
    shown = (image * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
    return image[None], shown.numpy()


@contextlib.contextmanager
def _sizes(model: nn.Module):
    """By module: height and width of the map that it is given, channels first or last as the layer takes them."""
    sizes = {}

    def note(name: str, module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            channels_last = type(module) in CHANNELS_LAST
            sizes[name] = tuple(args[0].shape[1:3] if channels_last else args[0].shape[2:])

    hooks = [module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
             for name, module in model.named_modules() if type(module) in PICTURES]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()
