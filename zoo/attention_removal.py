"""Vision transformers whose attention fades out of some blocks, and which blocks those should be (arXiv 2404.05657)."""
import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import InputError, first_few
from zoo.layers.attention_removal import DILUTED, DilutedBlock, dilute, diluted_kind, has_attention, remove_attention_of
from zoo.modules import evaluating


def remove_attention(model: nn.Module, blocks: Iterable[int], share: float | None = None) -> nn.Module:
    """Takes the attention out of blocks of a vision transformer, in place, at once or by and by, and returns the model.

        zoo.remove_attention(vit, [0, 2, 4], share=1.0)             # λ = 1: nothing has changed yet
        for epoch in range(400):
            zoo.remove_attention(vit, [0, 2, 4], share=zoo.attention_share(epoch, epochs=300))
            ...                                                     # train an epoch; all weights learn
        zoo.remove_attention(vit, [0, 2, 4])                        # and gone, with its parameters

        x ← (2 − λ) x + λ attention(norm(x)),  x ← x + MLP(norm(x))

    λ, the share, is a buffer `attention_share` of its block, and so part of the state dict. At 1 the outputs are what they were. At 0
    attention has become the identity: x ← 2x; its parameters are still there, with gradients of zeros, as optimizers and
    DistributedDataParallel need them. Without a share they are gone, and so are norm, layer scale and drop path before and after
    attention; what is left of the block is x ← 2x and the MLP. Other parameters are the same objects as before, under the same names.

    Args:
        model: a model of timm's plain blocks: ViT, DeiT, CLIP, DINOv2, EVA, DINOv3, BEiT, those with relative positions or norms
            after their branches.
        blocks: which of the model's blocks, counted from 0.
        share: λ, in [0, 1]; None to remove.

    To build the same network for saved weights, remove the same blocks of a new one before they are loaded.

    Raises:
        InputError: no such block, a share outside [0, 1], or one for a block whose attention is gone. The model is then as it was.
    """
    if share is not None and not 0 <= share <= 1:
        raise InputError(f"share must be in [0, 1], or None to remove attention, got {share!r}")
    found = _blocks_of(model)
    if not isinstance(blocks, Iterable):
        raise InputError(f"blocks must be several numbers of blocks, such as [{blocks!r}], got {blocks!r}")
    chosen = list(dict.fromkeys(blocks))
    if wrong := [block for block in chosen if not isinstance(block, int) or not 0 <= block < len(found)]:
        raise InputError(f"blocks of {type(model).__name__} are 0 to {len(found) - 1}, got {first_few(wrong)}")
    if share is not None and (gone := [block for block in chosen if not has_attention(found[block])]):
        raise InputError(f"a share of attention was asked for in block {first_few(gone)}, where attention has been removed")
    for block in chosen:
        kind = diluted_kind(found[block])
        assert kind is not None
        if share is not None:
            dilute(found[block], kind, share)
        elif has_attention(found[block]):
            remove_attention_of(found[block])
    return model


def attention_share(epoch: int, epochs: int) -> float:
    """The λ of an epoch, counted from 0, of a dilution over so many `epochs`: max(0, 1 − epoch / (epochs − 1)).

    Raises InputError for fewer than 2 epochs, and for an epoch before the first.
    """
    if epochs < 2 or epoch < 0:
        raise InputError(f"attention fades out over at least 2 epochs, which are counted from 0; got epoch {epoch} of {epochs}")
    return max(0.0, 1 - epoch / (epochs - 1))


class Choice(NamedTuple):
    """A block chosen to lose its attention, and the transfer entropies, in bits, of all that were left to choose from."""

    block: int
    entropies: dict[int, float]


def choose_blocks(model: nn.Module, batches: Iterable[tuple[Tensor, Any]], count: int) -> list[Choice]:
    """The blocks whose attention tells the network least, one after another (arXiv 2404.05657, NOSE).

        chosen = zoo.choose_blocks(vit, validation, count=3)
        zoo.remove_attention(vit, [choice.block for choice in chosen], share=1.0)

        H = Σ_channels log2 std over images of the logits;  transfer entropy of a set of blocks = |H(all) − H(without their attention)|

    Without its attention a block is x ← x, not the 2x of `zoo.remove_attention`, and its MLP. That block is chosen next whose
    transfer entropy, together with those chosen before, is least.

    Args:
        model: as for `zoo.remove_attention`, with logits (B, classes); it is run in evaluation mode and left as it was.
        batches: images, and what goes with them, which is not looked at, such as a DataLoader; moved to the model's device. Gone
            through `count` times, once for all blocks that are left.
        count: blocks to choose.

    Difference from the authors' code (sihaoevery/lambda_vit, models_shrink.py), which prints H of a set that is given: the sets are found,
    and statistics gathered batch by batch, in double precision.

    Raises:
        InputError: no blocks, or not as many with all of their attention; fewer than two images; logits that are none, or do not differ.
    """
    found = _blocks_of(model)
    left = [place for place, block in enumerate(found) if has_attention(block) and not isinstance(block, DilutedBlock)]
    if not isinstance(count, int) or not 0 < count <= len(left):
        raise InputError(f"{type(model).__name__} has {len(left)} blocks with all of their attention, of which {count!r} were to be chosen")
    chosen: list[Choice] = []
    while len(chosen) < count:
        before = [choice.block for choice in chosen]
        whole, *others = _entropies(model, found, [[], *([*before, place] for place in left)], batches)
        if not math.isfinite(whole):
            raise InputError("the logits of a class are the same for all images, or not finite, and say nothing of what attention matters")
        entropies = {place: math.inf if math.isnan(other) else abs(whole - other) for place, other in zip(left, others, strict=True)}
        chosen.append(Choice(min(left, key=lambda place: entropies[place]), entropies))
        left.remove(chosen[-1].block)
    return chosen


@torch.no_grad()
def _entropies(model: nn.Module, found: list[Any], sets: list[list[int]], batches: Iterable[tuple[Tensor, Any]]) -> list[float]:
    """H of the logits, once without the attention of the blocks of every set."""
    device, seen = next(model.parameters()).device, 0
    means: list[Tensor] = [torch.zeros(())] * len(sets)
    squares: list[Tensor] = [torch.zeros(())] * len(sets)  # sums of squared distances from the means
    with evaluating(model):
        for images, *_ in batches:
            total = seen + len(images)
            for place, skipped in enumerate(sets):
                with _skipping([found[block] for block in skipped]):
                    logits = model(images.to(device)).double().cpu()
                if logits.ndim != 2:
                    raise InputError(f"the entropy is of logits (B, classes), and {type(model).__name__} gives {tuple(logits.shape)}")
                mean = logits.mean(0)
                apart = mean - means[place]
                squares[place] = squares[place] + (logits - mean).square().sum(0) + apart.square() * (seen * len(images) / total)
                means[place] = means[place] + apart * (len(images) / total)
            seen = total
    if seen < 2:
        raise InputError(f"the entropy is of how logits differ over images, and {seen} came; batches are gone through once per block")
    return [float(square.div(seen - 1).sqrt().log2().sum()) for square in squares]


@contextlib.contextmanager
def _skipping(blocks: list[Any]) -> Iterator[None]:
    """Inside, the branches of these blocks' attention are zeros, of which drop path is the last module."""
    hooks = [block.drop_path1.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out)) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def diluted_blocks(model: nn.Module) -> dict[int, float]:
    """The blocks that have a share of attention, and the share."""
    return {place: float(block.attention_share) for place, block in enumerate(_blocks(model)) if isinstance(block, DilutedBlock)}


def _blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if diluted_kind(module) is not None]


def _blocks_of(model: nn.Module) -> list[Any]:
    found = _blocks(model)
    if not found:
        known = ", ".join(dict.fromkeys(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for kind in DILUTED))
        raise InputError(f"{type(model).__name__} has no block whose attention could be removed; timm's {known} are such blocks")
    return found
