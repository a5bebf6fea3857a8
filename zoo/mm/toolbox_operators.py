"""The toolboxes' operators and norms where training asks more of them than they know."""
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.amp import custom_fwd


@MODELS.register_module("SteadyBN")
class SteadyBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where there is one value per channel, which has no variance.

    That is so behind a pooling to 1×1, as UPerNet's, DeepLab's and PSPNet's heads have, in batches of one picture.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)


@contextlib.contextmanager
def operators_in_float32(toolbox: str) -> Iterator[None]:
    """Inside, under autocast, mmcv's compiled operators compute in float32: they do not know bfloat16, on any device.

    So do the parts that cut regions out of maps, whose coordinates bfloat16 would round to pixels.
    """
    import mmcv.ops  # noqa: F401  so that they are there

    with contextlib.ExitStack() as patches:
        for operator in torch.autograd.Function.__subclasses__():
            if operator.__module__.startswith("mmcv.ops."):
                patches.enter_context(mock.patch.object(operator, "forward", staticmethod(_in_float32(operator.forward))))
        for name in ("GenericRoIExtractor", "SingleRoIExtractor"):
            if (extractor := MODELS.get(f"{toolbox}.{name}")) is not None:
                patches.enter_context(mock.patch.object(extractor, "forward", _of_float32_maps(extractor.forward)))
        yield


def _in_float32(forward: Callable) -> Callable:
    for device in ("cpu", "cuda"):
        forward = custom_fwd(forward, device_type=device, cast_inputs=torch.float32)
    return forward


def _of_float32_maps(forward: Callable) -> Callable:
    def extract(self: nn.Module, maps: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Tensor:
        return forward(self, tuple(features.float() for features in maps), *args, **kwargs)

    return extract
