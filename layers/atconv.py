"""Attentive convolution (ATConv, arXiv 2510.20092)."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import depthwise_dynamic_conv2d
from zoo.kernels._exporting import is_exporting
from zoo.kernels._layout import in_layout_of
from zoo.kernels.depthwise_dynamic_conv2d.reference import inhibited

from ._capture import report
from ._positions_first import convolved, positions_first
from ._tracing import notrace_module


@notrace_module
class ATConv(nn.Module):
    """A convolution whose kernels every sample and channel makes from its own content (arXiv 2510.20092, section IV).

    The map's positions, in reading order, are averaged in k² runs; from these a linear layer makes the k×k kernel of the
    channel, whose weights then compete with their mean (see `zoo.kernels.depthwise_dynamic_conv2d`):

        K = kernel_gen(GELU(kernel_proj(pool_{k²}(x)))),  out = proj((K - sigmoid(θ) · mean(K)) ∗ x_proj(x))

    (B, C, H, W) → (B, C, H, W) in the memory layout of x, any height and width, any floating dtype. As timm's `attn_layer`:
    `timm.create_model("resnet50", block_args=dict(attn_layer=ATConv))`. `zoo.capture` gets the `kernels` that convolve,
    (B, C, k, k), with their inhibition.

    Args:
        dim: C.
        kernel_size: k, odd.
        bias: of the projections and of the linear layer.
        device, dtype: of the parameters, as in torch.

    θ is the parameter `difference_control` (C,), 0 at the start. It must not decay: having one dimension it does not under
    timm's rules for optimizers.

    Differences from the authors' code (price112/Attentive-Convolution, models/AttNet.py): the context is pooled before its
    projection, with which the pooling commutes. That saves a third of the products in projections and changes nothing but rounding.

    Raises:
        ValueError: a kernel size that is not odd, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.dim, self.kernel_size = dim, kernel_size
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.kernel_proj = nn.Conv2d(dim, dim, 1, bias=bias, **dd)
        self.kernel_gen = nn.Linear(kernel_size**2, kernel_size**2, bias=bias, **dd)
        self.x_proj = nn.Conv2d(dim, dim, 1, bias=bias, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, bias=bias, **dd)
        self.difference_control = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.difference_control)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"ATConv: x must be (B, {self.dim}, H, W), got shape {tuple(x.shape)}")
        maps = positions_first(x)
        kernels = self.kernels(maps)
        report(self, kernels=lambda: inhibited(kernels, self.difference_control))
        out = depthwise_dynamic_conv2d(convolved(self.x_proj, maps), kernels, self.difference_control)
        return in_layout_of(x, convolved(self.proj, out))

    def kernels(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, k, k), before the inhibition."""
        runs = _runs(self.kernel_size**2, x)
        if is_exporting():  # as few operators as by hand
            pooled = (x.flatten(2) @ runs)[..., None]
        else:  # no map is copied
            positions = x.permute(2, 3, 0, 1).flatten(0, 1)  # (H·W, B, C)
            pooled = (runs.t() @ positions.flatten(1)).unflatten(1, positions.shape[1:])[:, None].permute(2, 3, 0, 1)
        context = convolved(self.kernel_proj, pooled).squeeze(-1)
        return self.kernel_gen(F.gelu(context)).unflatten(-1, (self.kernel_size, self.kernel_size))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel_size={self.kernel_size}"


def _runs(count: int, x: Tensor) -> Tensor:
    """Adaptive average pooling of the H·W positions of x to `count` as a matrix (H·W, count): a product minds no layout."""
    length = x.shape[2] * x.shape[3]
    place, run = torch.arange(length, device=x.device)[:, None], torch.arange(count, device=x.device)
    # From ⌊run · length / count⌋ to below ⌈(run + 1) · length / count⌉, without a division, which is many operators in ONNX.
    inside = ((place + 1) * count > run * length) & (place * count < (run + 1) * length)
    return inside.to(x.dtype) / inside.sum(0)
