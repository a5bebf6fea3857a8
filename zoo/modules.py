"""What changes or asks a built model has to know of it: which modules `where` means, which are in training, when attention runs."""
import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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


class WatchingAttention(TorchFunctionMode):
    """Inside, `watch` is given the arguments of every call of torch's scaled_dot_product_attention before it runs."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.watch(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @abstractmethod
    def watch(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> None: ...
