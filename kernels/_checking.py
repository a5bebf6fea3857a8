"""The same look at every operator's arguments, whatever runs them: what does not fit ends in one sentence that names it."""
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._backends import autocasting
from ._exporting import known

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensors(
    operator: str, mixed: tuple[str, ...] = (), autocast: bool = False, empty: tuple[str, ...] = ("B",), /, **tensors: tuple[Any, str],
) -> None:
    """That every tensor has the axes that its text names ("B, H, W, C"), a floating dtype, and dtype and device of the first.

    Axes other than those of `empty` may not be. Where the text ends with a question mark, None is passed over.

    Args:
        mixed: those of any floating dtype.
        autocast: whether all are under autocast.
    """
    given: dict[str, tuple[Any, str]] = {
        name: (x, axes.rstrip("?")) for name, (x, axes) in tensors.items() if x is not None or not axes.endswith("?")}
    for name, (x, axes) in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor ({axes}), got {type(x).__name__}")
        if x.dtype not in FLOATING:
            raise TypeError(f"{operator}: {name} must be of a floating dtype, float32, float64, float16 or bfloat16, got {x.dtype}")
        letters = axes.split(", ")
        if x.ndim != len(letters):
            raise ValueError(f"{operator}: {name} must be ({axes}), got shape {tuple(x.shape)}")
        if any(known((length == 0,)) for letter, length in zip(letters, x.shape, strict=True) if letter not in empty):
            raise ValueError(
                f"{operator}: {name} must be ({axes}), of which {' and '.join(empty)} alone may be 0, got shape {tuple(x.shape)}")
    first, x = next((name, entry[0]) for name, entry in given.items())
    mixed = tuple(given) if autocast and autocasting(x.device.type) else mixed
    for name, (other, _) in given.items():
        if other.device != x.device:
            raise ValueError(f"{operator}: {name} must be on the device of {first} ({x.device}), got {other.device}")
        if other.dtype != x.dtype and name not in mixed:
            raise TypeError(f"{operator}: {name} must have the dtype of {first} ({x.dtype}), got {other.dtype}")


def check_whole(operator: str, name: str, least: int, *values: Any) -> None:
    """That these are whole numbers, not booleans, and at least so large. Traces of torch.jit hold tensors, which are not asked."""
    for value in values:
        if isinstance(value, Tensor) and torch.jit.is_tracing():
            continue
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{operator}: {name} must be whole, got {value!r}")
        if value < least:
            raise ValueError(f"{operator}: {name} must be at least {least}, got {value}")


def check_number(operator: str, name: str, value: Any) -> None:
    """That this is a finite number, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: {name} must be a number or None, got {value!r}")
    if not -math.inf < value < math.inf:  # of free numbers in graphs nothing else can be asked
        raise ValueError(f"{operator}: {name} must be finite, got {value}")


def pair(operator: str, name: str, value: Any) -> tuple[Any, Any]:
    """The two of a pair, of rows and columns; what they are is not asked."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return value[0], value[1]
    raise ValueError(f"{operator}: {name} must be a pair, for rows and columns, got {value!r}")
