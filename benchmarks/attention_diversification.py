"""A network that adds its attention diversification loss to its logits: the rival of `zoo benchmark` that shows what the loss costs.

    zoo benchmark deit_small_patch16_224_cb --against benchmarks.attention_diversification:build --size 512 512 --batch 2

compares training steps of 12 layers at 1,024 tokens (and the class token) without and with it: the loss costs the rival's memory
and time over ours. Forward passes are in evaluation, without it.
"""
import timm
from torch import Tensor, nn

import zoo


class Diversified(nn.Module):
    """`model`, in training with the loss added to every logit."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.loss = model, zoo.AttentionDiversificationLoss()

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return self.model(images)
        logits, similarity = self.loss(self.model, images)
        return logits + similarity


def build(name: str) -> nn.Module:
    return Diversified(timm.create_model(name))
