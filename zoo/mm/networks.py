"""Networks by name, for the tasks."""
from collections.abc import Mapping

import timm
from torch import nn

import zoo.models  # noqa: F401  registers them
from zoo.errors import InputError, near_misses


def create_network(name: str, args: Mapping) -> nn.Module:
    """`timm.create_model`. Raises InputError for an unknown name or argument."""
    if not timm.is_model(name):
        raise InputError(f"unknown model {name!r}{near_misses(name, timm.list_models())}")
    try:
        return timm.create_model(name, **args)
    except TypeError as error:
        raise InputError(f"model {name} cannot be created with {args}: {error}") from error


def plain(value: object) -> object:
    """Config containers as plain dicts, lists and tuples, which a checkpoint can hold."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value
