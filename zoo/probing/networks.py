"""The network that is probed: by its name or from a checkpoint, without its head."""
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import nn

from zoo.checkpoints import ModelInfo, load_model, load_trained, opened, without
from zoo.errors import InputError
from zoo.weights import load_weights


class Network(NamedTuple):
    """A network without a head, what it expects of pictures, the arguments of timm.create_model that build it, and whether its weights
    are random."""

    network: nn.Module
    info: ModelInfo
    model_args: dict[str, Any]
    random: bool


def open_network(model: str, *, weights: str | None = None, pretrained: bool = False, size: int | None = None, seed: int = 0) -> Network:
    """The network of a registered name, with weights from a file, downloaded, or random by `seed`; or that of a checkpoint.

    `size` is the side of the pictures that it sees. Raises InputError for what is no classifier, and what `load_model` refuses.
    """
    if weights and pretrained:
        raise InputError("--weights and --pretrained both say where to start from; give one")
    if timm.is_model(model):
        return _named(model, weights, pretrained, size, seed)
    for option, given in (("--weights", weights), ("--pretrained", pretrained), ("--size", size)):
        if given:
            raise InputError(f"{option} goes with a model's name, and {model} is a checkpoint, which has its own")
    if not Path(model).exists() and "/" not in model:
        load_model(model)  # says that there is no such model, and which are near
    checkpoint = opened(model)
    if checkpoint.record is not None and checkpoint.record.get("probe") is not None:
        raise InputError(f"{model} is a probe already; give the network that it was made of, {checkpoint.record.get('model')}")
    network, info = load_trained(checkpoint)
    _check(model, info)
    cast(Any, network).reset_classifier(0)
    args = without(cast(dict, checkpoint.record).get("model_args") or {}, ("num_classes",))
    return Network(network, info, {**args, "num_classes": 0}, False)


def _named(model: str, weights: str | None, pretrained: bool, size: int | None, seed: int) -> Network:
    _check(model, load_model(model)[1])
    args: dict[str, Any] = dict(num_classes=0) | ({} if size is None else _sized(model, size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network, info = load_model(model, pretrained=pretrained, **args)
        except RuntimeError as error:
            raise InputError(f"{model} cannot be had: {' '.join(str(error).split())}") from error
    if weights:
        load_weights(network, weights, new_head=True)
    if size is not None:
        info.data_config["input_size"] = (info.input_size[0], size, size)
    return Network(network, info, args, not (weights or pretrained))


def _check(model: str, info: ModelInfo) -> None:
    if info.task != "classification":
        raise InputError(f"{model} is for {info.task}, and heads are put on networks that tell pictures apart")


def _sized(model: str, size: int) -> dict[str, Any]:
    """The arguments by which a model takes pictures of `size`; most networks take any."""
    try:
        timm.create_model(model, img_size=size)
    except TypeError:
        return {}
    except (AssertionError, ValueError, RuntimeError) as error:
        raise InputError(f"{model} cannot take pictures of {size}x{size}: {error}") from error
    return {"img_size": size}
