"""DAS networks around torchvision's deformable convolution: the rival of `zoo benchmark`."""
import timm
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

import zoo  # noqa: F401  registers the models
from zoo.layers import DAS


class TorchvisionDAS(DAS):
    def gate(self, x: Tensor) -> Tensor:
        hidden = self.pointwise(self.depthwise(x))
        hidden = self.act(nn.functional.instance_norm(hidden))
        out = deform_conv2d(hidden, self.offset(hidden), self.weight, self.bias, padding=(self.padding, self.padding))
        return self.norm(out).sigmoid()


def build(name: str) -> nn.Module:
    """The network `name` of the zoo with torchvision's operator, random weights."""
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, DAS):
            module.__class__ = TorchvisionDAS
    return model
