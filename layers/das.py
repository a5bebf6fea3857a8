"""Deformable attention to salient information, DAS (arXiv 2311.12091)."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from zoo.kernels import deform_conv2d
from zoo.kernels._exporting import is_exporting

from ._capture import report
from ._tracing import notrace_module


@notrace_module
class DAS(nn.Module):
    """Gate of a CNN's map that looks where a deformable convolution takes it (arXiv 2311.12091, section 3).

        X_c = GELU(InstanceNorm(pointwise(depthwise(X)))),   about ratio · C channels
        out = X ⊙ sigmoid(LayerNorm(deformable(X_c, offsets(X_c))))

    (B, C, H, W) → (B, C, H, W), any height and width, any floating dtype. Usable as timm's `attn_layer`. `zoo.capture` gets the
    `offset` (B, 2·kernel_size², H, W), for each place of the kernel down and to the right in pixels of the map, and the `gate`.

    Args:
        dim: C.
        ratio: α, width of X_c over C.
        kernel_size: of the depthwise and the deformable convolution and of the one that predicts the offsets, odd.
        group_width: channels of the gate that each group of the deformable convolution makes, from round(ratio · group_width)
            channels of X_c; the largest common divisor with `dim` is taken. None: one group, and round(ratio · dim) channels.
        device, dtype: of the parameters, as in torch.

    The offsets begin at zero and the LayerNorm runs over the channels of each position, without the position's neighbours.

    There is no code by the authors (docs/cards/das.md). The choices that the formula leaves open are the cheaper ones: grouped deformable
    convolution (a dense one adds 44 % to the parameters of a ResNet-50, this 5 %: docs/das.md), one set of offsets for all channels, no
    factors of the samples, no affine parameters in the InstanceNorm.
    A map of a single position, whose InstanceNorm is zero, is an ordinary input.

    Raises:
        ValueError: arguments outside what is said above, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self, dim: int, ratio: float = 0.2, kernel_size: int = 3, group_width: int | None = 16,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not ratio > 0:
            raise ValueError(f"ratio must be positive, got {ratio}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if group_width is not None and group_width < 1:
            raise ValueError(f"group_width must be at least 1, or None for one group, got {group_width}")
        width = dim if group_width is None else math.gcd(dim, group_width)
        self.dim, self.padding = dim, kernel_size // 2
        self.hidden_dim = dim // width * max(1, round(ratio * width))
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.depthwise = nn.Conv2d(dim, dim, kernel_size, padding=self.padding, groups=dim, bias=False, **dd)
        self.pointwise = nn.Conv2d(dim, self.hidden_dim, 1, bias=False, **dd)
        self.act = nn.GELU()
        self.offset = nn.Conv2d(self.hidden_dim, 2 * kernel_size**2, kernel_size, padding=self.padding, **dd)
        self.weight = nn.Parameter(torch.empty(dim, self.hidden_dim * width // dim, kernel_size, kernel_size, **dd))
        self.bias = nn.Parameter(torch.empty(dim, **dd))
        self.norm = LayerNorm2d(dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv2d does
        for zero in (self.bias, *self.offset.parameters()):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """A, (B, C, H, W) in (0, 1)."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"DAS: x must be (B, {self.dim}, H, W), got shape {tuple(x.shape)}")
        hidden = self.pointwise(self.depthwise(x))
        # InstanceNorm; the module and functional forms refuse maps of one position, and exported, groups of one channel make guards.
        normal = F.layer_norm(hidden, hidden.shape[2:]) if is_exporting() else torch.group_norm(hidden, self.hidden_dim)
        hidden = self.act(normal)
        offset = self.offset(hidden)
        gate = self.norm(deform_conv2d(hidden, offset, self.weight, self.bias, padding=self.padding)).sigmoid()
        report(self, offset=offset, gate=gate)
        return gate

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden_dim={self.hidden_dim}"
