"""Blocks of vision transformers whose attention fades out, and is then gone (arXiv 2404.05657)."""
from typing import Any

import torch
from timm.models import beit, eva
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from ._tracing import notrace_module


@notrace_module
class NoAttention(nn.Module):
    """The identity in the place of attention, called as attention is; of images of any size."""

    rel_pos = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def set_window_size(self, size: tuple[int, int]) -> None:
        """What timm tells BEiT's attention when images change their size."""


@notrace_module
class DilutedBlock(nn.Module):
    """A block of a vision transformer with a share λ of its attention (arXiv 2404.05657):

        x ← (2 − λ) x + λ attention(norm(x)),  x ← x + MLP(norm(x))

    1 is the block as it was, bit for bit, and 0 is x ← 2x: attention has become the identity, and its gradients are zeros. Layer
    scales and drop path are within the branches. Made of a block that is built, by `dilute`; all of the block's modules and
    parameters stay, and there is a buffer `attention_share`, λ.
    """

    attention_share: Tensor
    undiluted: type[nn.Module]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self._diluted(x, self.drop_path1(_scaled(self, 1, self.attn(self.norm1(x), *args, **kwargs))))
        return x + self.drop_path2(_scaled(self, 2, self.mlp(self.norm2(x))))

    def _diluted(self, x: Tensor, branch: Tensor) -> Tensor:
        return (2 - self.attention_share) * x + self.attention_share * branch


@notrace_module
class DilutedPostNormBlock(DilutedBlock):
    """A `DilutedBlock` whose norms follow attention and MLP: x ← (2 − λ) x + λ norm(attention(x))."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self._diluted(x, self.drop_path1(self.norm1(self.attn(x, *args, **kwargs))))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


DILUTED: dict[type[nn.Module], type[DilutedBlock]] = {
    vit.Block: DilutedBlock, eva.EvaBlock: DilutedBlock, beit.Block: DilutedBlock, relpos.RelPosBlock: DilutedBlock,
    vit.ResPostBlock: DilutedPostNormBlock, eva.EvaBlockPostNorm: DilutedPostNormBlock, relpos.ResPostRelPosBlock: DilutedPostNormBlock,
}


def diluted_kind(module: nn.Module) -> type[DilutedBlock] | None:
    """What `dilute` makes of a block; None for other modules, and for blocks that run otherwise than their class."""
    if "forward" in vars(module):
        return None
    if isinstance(module, DilutedBlock):
        return type(module)
    return next((kind for block, kind in DILUTED.items() if isinstance(module, block) and type(module).forward is block.forward), None)


def has_attention(block: nn.Module) -> bool:
    return not isinstance(block.attn, NoAttention)


def dilute(block: nn.Module, kind: type[DilutedBlock], share: float) -> None:
    """Leaves the block a share λ of its attention, in [0, 1], in place."""
    made: Any = block
    if not isinstance(block, DilutedBlock):
        made.undiluted = type(block)
        block.__class__ = kind
        weight = next(parameter for parameter in block.parameters() if parameter.is_floating_point())
        block.register_buffer("attention_share", torch.ones((), device=weight.device))
    made.attention_share.fill_(share)


def remove_attention_of(block: nn.Module) -> None:
    """Leaves the block x ← 2x in the place of attention, in place: the norm and all that belonged to it are gone, with their parameters."""
    made: Any = block
    if isinstance(block, DilutedBlock):
        made.__class__ = block.undiluted
        del made.undiluted, made.attention_share
    made.attn = NoAttention().train(block.training)
    for name in ("norm1", "ls1", "drop_path1"):
        if hasattr(block, name):
            setattr(block, name, nn.Identity().train(block.training))
    if getattr(block, "gamma_1", None) is not None:  # BEiT's scale of its MLP goes with it
        del made.gamma_1
        made.gamma_1 = 1.0


def _scaled(block: nn.Module, number: int, branch: Tensor) -> Tensor:
    """The branch of attention, 1, or of the MLP, 2, after the block's layer scale: a module, or of EVA and BEiT a parameter."""
    if (scale := getattr(block, f"ls{number}", None)) is not None:
        return scale(branch)
    gamma = getattr(block, f"gamma_{number}", None)
    return branch if gamma is None else gamma * branch
