"""Attentive convolution (ATConv, arXiv 2510.20092)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import depthwise_dynamic_conv2d
from zoo.kernels._layout import in_layout_of


class ATConv(nn.Module):
    """A convolution whose kernels every sample and channel makes from its own content (arXiv 2510.20092, section IV).

    The map's positions, in reading order, are averaged in k² runs; from these a linear layer makes the k×k kernel of the
    channel, whose weights then compete with their mean (see `zoo.kernels.depthwise_dynamic_conv2d`):

        K = kernel_gen(GELU(kernel_proj(pool_{k²}(x)))),  out = proj((K - sigmoid(θ) · mean(K)) ∗ x_proj(x))

    (B, C, H, W) → (B, C, H, W) in the memory layout of x, any height and width, any floating dtype. As timm's `attn_layer`:
    `timm.create_model("resnet50", block_args=dict(attn_layer=ATConv))`.

    Args:
        dim: C.
        kernel_size: k, odd.
        bias: of the projections and of the linear layer.

    θ is the parameter `difference_control` (C,), 0 at the start. It must not decay: having one dimension it does not under
    timm's rules for optimizers.

    Differences from the authors' code: the context is pooled before its projection, with which the pooling commutes. That
    saves a third of the products in projections and changes nothing but rounding.

    Raises:
        ValueError: a kernel size that is not odd, at construction; a map of another shape, in `forward`.
    """

    def __init__(self, dim: int, kernel_size: int = 3, bias: bool = True):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.dim, self.kernel_size = dim, kernel_size
        self.kernel_proj = nn.Linear(dim, dim, bias=bias)
        self.kernel_gen = nn.Linear(kernel_size**2, kernel_size**2, bias=bias)
        self.x_proj = nn.Linear(dim, dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.difference_control = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"ATConv: x must be (B, {self.dim}, H, W), got shape {tuple(x.shape)}")
        maps = x.permute(2, 3, 0, 1).contiguous()  # (H, W, B, C), in which nothing below copies a map
        values = self.x_proj(maps).permute(2, 3, 0, 1)
        out = depthwise_dynamic_conv2d(values, self.kernels(maps), self.difference_control)
        return in_layout_of(x, self.proj(out.permute(2, 3, 0, 1)).permute(2, 3, 0, 1))

    def kernels(self, maps: Tensor) -> Tensor:
        """(H, W, B, C) → (B, C, k, k), before the inhibition."""
        h, w, b, c = maps.shape
        pooled = _runs(self.kernel_size**2, h * w, maps) @ maps.reshape(h * w, b * c)
        context = self.kernel_proj(pooled.reshape(-1, b, c)).permute(1, 2, 0)
        return self.kernel_gen(F.gelu(context)).reshape(b, c, self.kernel_size, self.kernel_size)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel_size={self.kernel_size}"


def _runs(count: int, length: int, like: Tensor) -> Tensor:
    """Adaptive average pooling from `length` to `count` as a matrix (count, length): a product with it has no layout to obey."""
    run, place = torch.arange(count, device=like.device)[:, None], torch.arange(length, device=like.device)
    start, end = run * length // count, ((run + 1) * length + count - 1) // count
    return ((place >= start) & (place < end)).to(like.dtype) / (end - start)
