"""Networks by name, for the tasks."""
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

import zoo.models  # noqa: F401  registers them
from zoo.errors import InputError, near_misses
from zoo.weights import load_weights, weights_in

WHOLE = ("decoder.", "decoder/", "layers_up.", "salu_mamba.")  # how names begin that no encoder has: ours, InSPyReNet's, MSI-Net's, SUM's


def create_network(name: str, args: Mapping) -> Any:
    """`timm.create_model`: a module, with the attributes of its family.

    Raises InputError for an unknown name or argument, and for a file of weights that is not there.
    """
    if not timm.is_model(name):
        raise InputError(f"unknown model {name!r}{near_misses(name, timm.list_models())}")
    try:
        return timm.create_model(name, **args)
    except TypeError as error:
        raise InputError(f"model {name} cannot be created with {args}: {error}") from error
    except FileNotFoundError as error:  # timm's says nothing
        raise InputError(f"model {name} starts from a file of weights that is not there: {', '.join(_files_in(args)) or error}") from error


def _files_in(args: Mapping) -> list[str]:
    """The files of weights that arguments of timm name."""
    named = {**args, **(args.get("pretrained_cfg_overlay") or {})}
    return [str(named[key]) for key in ("checkpoint_path", "file") if named.get(key)]


def load_whole_or_encoder(model: Any, file: str) -> None:
    """Takes weights in a file, of the network, or else those of its encoder alone, which its `load_encoder` reads."""
    if any(name.startswith(WHOLE) for name in weights_in(file, own=model.state_dict())):
        load_weights(model, file)
    else:
        model.load_encoder(file)


def freeze_but(module: nn.Module, *trained: nn.Module) -> None:
    """Only what is in `trained` learns, of all that is in `module`, and only that is not as in evaluation."""
    module.requires_grad_(False).eval()
    for part in trained:
        part.requires_grad_(True).train()


def plain(value: Any) -> Any:
    """Config containers as plain dicts, lists and tuples, which a checkpoint can hold."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value
