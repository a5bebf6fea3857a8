"""Selective kernel units (Selective Kernel Networks, arXiv 1903.06586)."""
import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module


@notrace_module
class SelectiveKernelUnit(nn.Module):
    """Convolutions of several kernel sizes, weighted by a softmax over them per channel (arXiv 1903.06586, section 3.1).

    Split, fuse and select, for the branches m = 1 … M and every channel c:

        U_m = ReLU(BN(conv_m(X))),  s = mean over positions of Σ_m U_m
        z = ReLU(BN(reduce(s))) of width max(C / reduction, min_width),  a = softmax over m of select(z)
        out_c = Σ_m a_mc · U_mc

    (B, dim, H, W) → (B, out_dim, ⌈H / stride⌉, ⌈W / stride⌉), any height and width, any floating dtype. While training, the
    BN of z needs more than one image in a batch. `zoo.capture` gets the `weights` a, (B, M, C, 1, 1).

    Args:
        dim: channels of the input.
        out_dim: C, default `dim`.
        kernel_sizes: one odd number per branch.
        dilated: kernels above 3 are 3×3 ones, spread out (5: dilation 2, 7: dilation 3, as in the paper's networks);
            False takes true kernels.
        groups: of the convolutions, one number or one per branch; default 32, or what 32 and both widths have in common.
        stride, dilation: of all branches; `dilation` multiplies what `dilated` sets.
        reduction, min_width: r and L of the paper.
        act_layer, norm_layer, device, dtype: as in timm.

    Differences from the authors' code: theirs (Caffe; implus/PytorchInsight, classification/models/imagenet/resnet_sk.py) is
    written for two branches. timm's `SelectiveKernel` equals this one where its `split_input` is off; it rounds the width
    of z to multiples of 8.

    Raises:
        ValueError: arguments outside what is said above, at construction.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        kernel_sizes: Sequence[int] = (3, 5),
        dilated: bool = True,
        groups: int | Sequence[int] | None = None,
        stride: int = 1,
        dilation: int = 1,
        reduction: int = 16,
        min_width: int = 32,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        out_dim, n = out_dim or dim, len(kernel_sizes)
        groups = math.gcd(32, dim, out_dim) if groups is None else groups
        groups = [groups] * n if isinstance(groups, int) else list(groups)
        _check(dim, out_dim, kernel_sizes, groups)
        width = max(out_dim // reduction, min_width)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)

        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for kernel, branch_groups in zip(kernel_sizes, groups, strict=True):
            size, spread = (3, kernel // 2 * dilation) if dilated and kernel > 3 else (kernel, dilation)
            self.convs.append(nn.Conv2d(
                dim, out_dim, size, stride, kernel // 2 * dilation, spread, branch_groups, bias=False, **dd))
            self.norms.append(norm_layer(out_dim, **dd))
        self.act = act_layer()
        self.reduce = nn.Conv2d(out_dim, width, 1, bias=False, **dd)
        self.norm = norm_layer(width, **dd)
        self.select = nn.Conv2d(width, n * out_dim, 1, bias=False, **dd)

    def branches(self, x: Tensor) -> list[Tensor]:
        """The maps U_m."""
        return [self.act(norm(conv(x))) for conv, norm in zip(self.convs, self.norms, strict=True)]

    def weights(self, maps: list[Tensor]) -> Tensor:
        """(B, M, C, 1, 1): the weights a of the maps U_m."""
        pooled = reduce(torch.add, [y.mean((2, 3), keepdim=True) for y in maps])
        z = self.act(self.norm(self.reduce(pooled)))
        weights = self.select(z).unflatten(1, (len(maps), -1)).softmax(1)
        report(self, weights=weights)
        return weights

    def forward(self, x: Tensor) -> Tensor:
        maps = self.branches(x)
        return reduce(torch.add, [weight * y for weight, y in zip(self.weights(maps).unbind(1), maps, strict=True)])


def _check(dim: int, out_dim: int, kernel_sizes: Sequence[int], groups: list[int]) -> None:
    if not kernel_sizes or any(kernel < 1 or kernel % 2 == 0 for kernel in kernel_sizes):
        raise ValueError(f"kernel_sizes must be odd numbers, at least one, got {tuple(kernel_sizes)}")
    if len(groups) != len(kernel_sizes):
        raise ValueError(f"groups must be one number or one for each of {len(kernel_sizes)} branches, got {tuple(groups)}")
    if any(g < 1 or dim % g or out_dim % g for g in groups):
        raise ValueError(f"groups must divide dim ({dim}) and out_dim ({out_dim}), got {tuple(groups)}")
