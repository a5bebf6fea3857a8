"""Modules whose weights a faster formulation reads, without calling them.

They are torch's own classes, which tools know by their type: counters of operations, pruning, quantization, adapters. What such a
tool puts on a module runs only if the module is called, so a module is called unless it is as torch made it.
"""
from typing import TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook  # private, and the only source of it

Module = TypeVar("Module", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[Module]) -> TypeGuard[Module]:
    """Whether calling the module does no more than `kind` does with its weights: it has its type, its `forward` and no hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    everywhere = not torch.compiler.is_compiling() and _has_any_global_hook()
    return type(module) is kind and "forward" not in vars(module) and not hooks and not everywhere
