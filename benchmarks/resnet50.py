"""timm's ResNet-50 as everybody's rival: the unit of the latencies in docs/models.md."""
import timm
from torch import nn


def build(name: str) -> nn.Module:
    return timm.create_model("resnet50").eval()
