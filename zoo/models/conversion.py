"""Checkpoints of other code: their names → ours."""
import re
from collections.abc import Callable, Iterable


def renamed(name: str, renames: Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]) -> str:
    """A parameter's name after all of `renames`, pairs of a pattern and what takes its place, one after the other."""
    for pattern, ours in renames:
        name = re.sub(pattern, ours, name)
    return name
