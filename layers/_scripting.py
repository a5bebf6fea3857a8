"""TorchScript's compiler, which none of the layers is for."""
from typing import NoReturn

from torch import nn


def refuse_scripting(module: nn.Module) -> NoReturn:
    """What `torch.jit.script` calls before it compiles a module: as `__prepare_scriptable__` of a class it refuses its modules."""
    raise NotImplementedError(
        f"{type(module).__name__} cannot be scripted: torch.jit.script is deprecated, and torch.compile, torch.export and "
        "torch.jit.trace take its place")
