"""First values of weights, by rules that the authors of several layers share.

tests/models/test_initialization.py compares every network's with a table of its authors'.
"""
import math
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def fan_out_normal_(conv: nn.Conv2d) -> None:
    """Weights N(0, 2 / n), n the kernel's positions times the channels that a group puts out; bias 0 (FAN, LITv2)."""
    fan_out = conv.weight[0, 0].numel() * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def fan_in_normal_(modules: Iterable[nn.Module]) -> None:
    """Weights of convolutions N(0, 2 / n), n the numbers that one output is made of; factors of batch norms N(1, 0.02²) (U-Nets)."""
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, _BatchNorm):
            nn.init.normal_(module.weight, 1, 0.02)
