"""Adaptive average pooling that exports with free sizes."""
import torch
from torch import Tensor, nn


class AdaptiveAvgPool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as a product of matrices, which ONNX has for any size of its input."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self._weights(x.shape[2], x) @ x @ self._weights(x.shape[3], x).T

    def _weights(self, length: int, like: Tensor) -> Tensor:
        """(size, length): row i averages the positions from ⌊i·length / size⌋ to before ⌈(i + 1)·length / size⌉."""
        i, position = torch.arange(self.size, device=like.device)[:, None], torch.arange(length, device=like.device)
        inside = (position >= i * length // self.size) & (position < ((i + 1) * length + self.size - 1) // self.size)
        return inside.to(like.dtype) / inside.sum(1, keepdim=True)
