"""What was done to a network after it was built, in plain values: configs say it, and checkpoints record it."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from zoo.attention_removal import diluted_blocks, remove_attention
from zoo.errors import InputError, near_misses
from zoo.heads import prune_heads, regroup_heads
from zoo.replace_attention import replace_attention

Change = Mapping[str, Any]  # the name of one of `CHANGES` under `type`, and its arguments
CHANGES: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (prune_heads, regroup_heads, remove_attention, replace_attention)}


def are_changes(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(change, Mapping) and change.get("type") in CHANGES for change in value)


def change(model: nn.Module, changes: Sequence[Change]) -> None:
    """Makes all of `changes` to the model, in place, one after the other.

    Raises InputError for a change that there is not, or that does not fit the model.
    """
    for described in changes:
        name, arguments = described.get("type"), {key: value for key, value in described.items() if key != "type"}
        if name not in CHANGES:
            raise InputError(f"there is no change {name!r}{near_misses(str(name), CHANGES)}; changes are {', '.join(CHANGES)}")
        try:
            CHANGES[name](model, **arguments)
        except TypeError as error:
            raise InputError(f"{name} cannot be done with {arguments}: {error}") from error


def finish(model: nn.Module, changes: Sequence[Change]) -> list[Change]:
    """Takes out the attention of which a dilution has left nothing; returns all changes that the model has then had, after `changes`."""
    gone = [block for block, share in diluted_blocks(model).items() if share == 0]
    if not gone:
        return list(changes)
    remove_attention(model, gone)
    return [*changes, {"type": "remove_attention", "blocks": gone}]
