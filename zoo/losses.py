"""Losses on what happens inside a network."""
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from zoo.errors import InputError
from zoo.kernels import attention_cross_entropy, attention_similarity
from zoo.layers import HedgehogAttention, NormalizedAttention

SPELLED_OUT = (Attention, AttentionRope, BeitAttention, NormalizedAttention)


class AttentionDiversificationLoss(nn.Module):
    """Runs a network and tells how alike the attention of its tokens is (ADL, arXiv 2303.11126, section 3.2); to be made small.

        diversification = AttentionDiversificationLoss()
        logits, similarity = diversification(model, images)
        (criterion(logits, targets) + similarity).backward()

    The similarity is the mean of `zoo.kernels.attention_similarity` over the layers in which all tokens of an image attend to
    one another: those of any timm vision transformer, fused or not, of FAN, and of BiFormer's last stage. Attention with a
    mask or within windows, and that of a class token alone, does not count.

    The network is run as it is: nothing is left in it, and without this loss nothing is different. Layers are found as they
    call torch's scaled_dot_product_attention. Beyond their queries and keys, which training keeps anyway, a layer keeps
    O(B · N) numbers, not its attention. Gradient checkpointing keeps queries and keys, too.

    Args:
        threshold: weights of attention up to threshold / N are left out; the authors' code has 2.

    Difference from the authors' code (guoyongcs/TAPADL, TAPADL_FAN/main.py): theirs divides by the number of layers plus 1e-6.

    Raises:
        ValueError: a negative threshold, at construction; in `forward`, a network without such a layer, such as BEiT, whose attention
            has a bias, or one that combines gradient checkpointing with timm's attention spelled out.

    Attention that is nearly uniform, as that of a new network, has no weight above threshold / N for a threshold from about 1: the
    similarity is 0 then, and has no gradient.
    """

    def __init__(self, threshold: float = 2.0):
        super().__init__()
        if not threshold >= 0:
            raise InputError(f"threshold must be at least 0, got {threshold}")
        self.threshold = threshold

    def forward(self, model: nn.Module, images: Tensor) -> tuple[Any, Tensor]:
        """What model(images) returns, and the similarity, a scalar in [0, 1]; images (B, …)."""
        similarities: list[Tensor] = []
        with fused(model), _Similarities(images.shape[0], self.threshold, similarities) as seen:
            out = model(images)
        if not similarities and seen.biased:
            raise InputError(f"{type(model).__name__} adds a bias or a mask to the attention of all tokens, as BEiT its relative "
                             "positions, and the attention diversification loss takes attention of queries and keys alone")
        if not similarities:
            raise InputError(f"{type(model).__name__} has no layer in which all tokens of an image attend to one another, "
                             "which the attention diversification loss needs")
        return out, torch.stack(similarities).mean()

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class _Similarities(TorchFunctionMode):
    """Adds to `found` the similarity of every attention between all tokens of the images."""

    def __init__(self, batch: int, threshold: float, found: list[Tensor]):
        super().__init__()
        self.batch, self.threshold, self.found, self.biased = batch, threshold, found, False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self._add(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _add(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
             is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> None:
        among_all = query.ndim == 4 and query.shape[0] == self.batch and query.shape == key.shape
        self.biased |= among_all and (attn_mask is not None or is_causal)
        if among_all and attn_mask is None and not is_causal:
            with _kept():
                self.found.append(attention_similarity(query, key, self.threshold, scale))


def _kept() -> contextlib.AbstractContextManager:
    """Keeps gradient checkpointing from looking for the tensors saved inside when it runs the layer again."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else saved_tensors_hooks(lambda x: x, lambda x: x)


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Inside, lets timm's attention run as scaled_dot_product_attention, which computes the same."""
    spelled_out = [m for m in model.modules() if isinstance(m, SPELLED_OUT) and not m.fused_attn]
    if spelled_out and any(getattr(m, "grad_checkpointing", False) for m in model.modules()):
        raise InputError("the attention diversification loss needs fused attention where gradients are checkpointed: "
                         "leave one of checkpointing and fused_attn=False")
    for module in spelled_out:
        vars(module)["fused_attn"] = True
    try:
        yield
    finally:
        for module in spelled_out:
            vars(module)["fused_attn"] = False


class AttentionDistillationLoss(nn.Module):
    """How far Hedgehog's linear attention is from the softmax attention whose place it took (arXiv 2402.04347); to be made small.

        vit = zoo.replace_attention(vit, "hedgehog")
        distillation = zoo.AttentionDistillationLoss()
        distillation(vit, images).backward()

    The network is run with softmax attention, as if nothing had been replaced, and without gradients; every layer's queries and keys
    are what its feature maps learn from: gradients reach those alone. The loss is the mean over layers of
    `zoo.kernels.attention_cross_entropy`. No attention matrix is kept: memory is linear in tokens. Nothing is left in the network.

    In training mode what the network drops is dropped; distil in evaluation mode for the teacher's own attention.

    Raises:
        ValueError: in `forward`, a network without Hedgehog attention, or one that masks it.
    """

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """The loss, a scalar; images (B, …), as `model` takes them."""
        layers = [module for module in model.modules() if isinstance(module, HedgehogAttention)]
        if not layers:
            raise InputError(f"{type(model).__name__} has no Hedgehog attention to distil; "
                             "zoo.replace_attention(model, 'hedgehog') puts it in")
        losses: list[Tensor] = []
        hooks = [layer.register_forward_hook(partial(_taught, losses)) for layer in layers]
        try:
            with torch.no_grad():
                model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(losses).mean()


def _taught(losses: list[Tensor], layer: HedgehogAttention, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """What softmax attention puts out in the place of `layer`, whose distance from it is added to `losses`."""
    q, k, v, bias, scale, _ = args
    if bias is not None:
        raise InputError("the attention distillation loss is for attention without a mask")
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        losses.append(attention_cross_entropy(q, k, *layer.features(q, k), scale))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
