"""Modules that torch.fx takes as they are."""
from typing import TypeVar

from timm.layers import register_notrace_module
from torch import nn

Module = TypeVar("Module", bound=type[nn.Module])


def notrace_module(module: Module) -> Module:
    """A class decorator: timm's tracers do not look inside. timm's own returns any `nn.Module`, to type checkers."""
    register_notrace_module(module)
    return module
