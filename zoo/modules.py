"""What changes or asks a built model has to know of its modules: which are meant by `where`, and which are in training."""
import contextlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from zoo.errors import InputError, near_misses


def matching(where: str | Iterable[str], modules: dict[str, nn.Module]) -> list[str]:
    """The modules that the patterns name, in the model's order."""
    matched = set()
    for pattern in [where] if isinstance(where, str) else where:
        parts = pattern.split(".")
        found = [name for name in modules if name and _fits(name.split("."), parts)]
        if not found:
            raise InputError(f"the model has no module {pattern!r}{near_misses(pattern, modules)}")
        matched.update(found)
    return [name for name in modules if name in matched]


def _fits(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode inside, and as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
