"""timm's ResNet-50 as everybody's rival: the unit of the latencies in docs/models.md."""
import timm
from torch import Tensor, nn


class ResNet50(nn.Module):
    """Of images (batch, 3, height, width); of all slices, one by one, of grey volumes (batch, 1, depth, height, width)."""

    def __init__(self):
        super().__init__()
        self.network = timm.create_model("resnet50")

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim == 5:
            images = images.transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1)
        return self.network(images)


def build(name: str) -> nn.Module:
    return ResNet50().eval()
