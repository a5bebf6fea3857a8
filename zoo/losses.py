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

from zoo.errors import InputError
from zoo.kernels import attention_cross_entropy, attention_similarity
from zoo.layers import HedgehogAttention, MixtureOfHeads, NormalizedAttention, SparsifinerAttention
from zoo.layers.image_pyramid import reduce
from zoo.layers.multiple_instance import BagOutput
from zoo.models.inspyrenet import Pyramid
from zoo.modules import WatchingAttention

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


class _Similarities(WatchingAttention):
    """Adds to `found` the similarity of every attention between all tokens of the images."""

    def __init__(self, batch: int, threshold: float, found: list[Tensor]):
        super().__init__()
        self.batch, self.threshold, self.found, self.biased = batch, threshold, found, False

    def watch(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
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


class LoadBalancingLoss(nn.Module):
    """Runs a network and tells how unevenly its tokens pick heads (MoH, arXiv 2410.11842, section 3.3); to be made small.

        balancing = zoo.LoadBalancingLoss()
        logits, balance = balancing(model, images)
        (criterion(logits, targets) + 0.01 * balance).backward()

    The mean over the layers that route of E Σ_e P_e f_e: of each of the E heads that are not shared, the mean over all tokens of the batch
    of its score p, and the share of tokens that it is active for. With k active heads it is k where all are picked alike, and E
    where all tokens pick one; the gradient is of P alone. Modes do not matter. Nothing is left in the network, and gradients may be
    checkpointed.

    Difference from the authors' code (SkyworkAI/MoH, MoH-ViT/engine.py): theirs collects losses in an attribute of a class, for all
    networks of a process, and is to be emptied before every step.

    Raises:
        ValueError: in `forward`, a network whose layers route no heads.
    """

    def forward(self, model: nn.Module, images: Tensor) -> tuple[Any, Tensor]:
        """What model(images) returns, and the loss, a scalar of at least float32; images (B, …)."""
        with balances(model) as found:
            out = model(images)
        return out, torch.stack(found).mean()


@contextlib.contextmanager
def balances(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects `MixtureOfHeads.balance` of every layer that routes heads and runs inside."""
    routers = [module for module in model.modules() if isinstance(module, MixtureOfHeads) and module.routed is not None]
    if not routers:
        raise InputError(f"{type(model).__name__} has no layer whose tokens pick heads, which the load balancing loss needs; "
                         "zoo.replace_attention(model, 'moh') puts it in")
    found: list[Tensor] = []

    def take(scores: Tensor, router: MixtureOfHeads) -> None:
        with _kept():
            found.append(router.balance(scores))

    for router in routers:
        router.take_scores = partial(take, router=router)
    try:
        yield found
    finally:
        for router in routers:
            router.take_scores = None


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
        return torch.stack(_taught_layers(model, images, HedgehogAttention, "hedgehog", _imitated)).mean()


class MultipleInstanceLoss(nn.Module):
    """The loss of ACMIL (arXiv 2311.07125, section 3), of what a `zoo.layers.MultipleInstanceHead` says of bags; to be made small.

        CE(logits, y) + mean_k CE(branch_logits_k, y) + mean over pairs of branches of the cosine of their attention

    The last makes branches look at different instances. With one branch, the first alone. Means over bags, and over heads.

    Args of `forward`:
        output: a `BagOutput` of B bags.
        labels: (B), int64.

    Returns:
        The three terms by name, bag, branch and diversity, whose sum is the loss.

    Raises:
        InputError: labels of another shape.
    """

    def forward(self, output: BagOutput, labels: Tensor) -> dict[str, Tensor]:
        if labels.shape != output.logits.shape[:1]:
            raise InputError(f"labels must be ({len(output.logits)},), one of every bag, got shape {tuple(labels.shape)}")
        terms = {"bag": F.cross_entropy(output.logits, labels)}
        branches = output.branch_logits.shape[1]
        if branches:
            terms["branch"] = F.cross_entropy(output.branch_logits.flatten(0, 1), labels.repeat_interleave(branches))
            above = torch.ones(branches, branches, dtype=torch.bool, device=labels.device).triu(1)
            alike = [F.normalize(piece, dim=-1) @ F.normalize(piece, dim=-1).mT for piece in output.attention.split(output.sizes, -1)]
            terms["diversity"] = torch.stack([cosines[..., above].mean() for cosines in alike]).mean()
        return terms


def _taught_layers(model: nn.Module, images: Tensor, kind: type[nn.Module], name: str, teach: Callable[..., Tensor]) -> list[Tensor]:
    """Runs the network without gradients; what `teach` finds in every layer of `kind` puts the layer's own outputs aside."""
    layers = [module for module in model.modules() if isinstance(module, kind)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no {name.capitalize()} attention to train; "
                         f"zoo.replace_attention(model, {name!r}) puts it in")
    losses: list[Tensor] = []
    hooks = [layer.register_forward_hook(partial(teach, losses)) for layer in layers]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return losses


def _imitated(losses: list[Tensor], layer: HedgehogAttention, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """What softmax attention puts out in the place of `layer`, whose distance from it is added to `losses`."""
    q, k, v, bias, scale, _ = args
    if bias is not None:
        raise InputError("the attention distillation loss is for attention without a mask")
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        losses.append(attention_cross_entropy(q, k, *layer.features(q, k), scale))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class SparsifinerReconstructionLoss(nn.Module):
    """How far Sparsifiner's predicted attention is from that of all keys (arXiv 2303.13755); to be made small, before all else.

        vit = zoo.replace_attention(vit, "sparsifiner")
        reconstruction = zoo.SparsifinerReconstructionLoss()
        reconstruction(vit, images).backward()

    The network is run with attention to all keys, as if nothing had been replaced, and without gradients: it is its own teacher.
    Every layer's queries and keys are what its predictor learns from: gradients reach the predictors alone. The loss is 0.01 times
    the mean over layers of Σ (C Uᵀ - A)² over images, heads, queries and keys: it grows with the batch, and so does its gradient, as in
    the authors' code. Nothing is left in the network. Matrices of tokens are kept for all layers until the backward pass.

    In training mode what the network drops is dropped; train in evaluation mode for the teacher's own attention.

    Raises:
        ValueError: in `forward`, a network without Sparsifiner's attention.
    """

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """The loss, a scalar; images (B, …), as `model` takes them."""
        return 0.01 * torch.stack(_taught_layers(model, images, SparsifinerAttention, "sparsifiner", _reconstructed)).mean()


def _reconstructed(losses: list[Tensor], layer: SparsifinerAttention, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """What attention to all keys puts out in the place of `layer`, whose error is added to `losses`."""
    q, k, v, bias, scale, dropout = args
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        losses.append(layer.reconstruction_error(q, k, bias, scale))
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)


class TokenDistillationLoss(nn.Module):
    """The loss on labels, and how far logits and tokens are from a teacher's; what Sparsifiner is fine-tuned with (arXiv 2303.13755).

        teacher = copy.deepcopy(vit).eval()
        distillation = zoo.TokenDistillationLoss(teacher)
        distillation(vit, images, labels).backward()

    criterion(logits, labels) + `logits` · KL(teacher's ‖ network's classes), mean over images, + `tokens` · mean (difference of
    tokens)², of the patches' tokens that `forward_features` of either network puts out. The teacher runs as it is, without gradients,
    and is no part of this module: it is neither among its parameters nor in its state.

    Raises:
        ValueError: at construction, a teacher without timm's `forward_features`; in `forward`, tokens or logits of another shape than the
            teacher's.
    """

    def __init__(self, teacher: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, logits: float = 0.5,
                 tokens: float = 0.5):
        super().__init__()
        if not hasattr(teacher, "forward_features") or not hasattr(teacher, "forward_head"):
            raise InputError(f"the teacher has to have timm's forward_features and forward_head, and {type(teacher).__name__} has not")
        self._teacher, self.criterion, self.logits, self.tokens = (teacher,), criterion, logits, tokens

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar; images (B, …), labels as `criterion` takes them."""
        logits, tokens = _logits_and_tokens(model, images)
        with torch.no_grad():
            expected_logits, expected_tokens = _logits_and_tokens(self._teacher[0], images)
        for what, ours, theirs in (("tokens", tokens, expected_tokens), ("logits", logits, expected_logits)):
            if ours.shape != theirs.shape:
                raise InputError(f"{what} of {type(model).__name__} are of shape {tuple(ours.shape)}, "
                                 f"the teacher's of {tuple(theirs.shape)}")
        divergence = F.kl_div(logits.log_softmax(-1), expected_logits.log_softmax(-1), reduction="batchmean", log_target=True)
        loss = self.criterion(logits, labels)
        return loss + self.logits * divergence + self.tokens * F.mse_loss(tokens, expected_tokens)


def _logits_and_tokens(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.forward_features(images)
    return model.forward_head(tokens), tokens[:, getattr(model, "num_prefix_tokens", 0) :]


class SaliencyPyramidLoss(nn.Module):
    """How far a pyramid of logits is from a mask at every level, and how consistent its levels are (InSPyReNet, arXiv 2209.09475, 3.4).

        loss = zoo.SaliencyPyramidLoss()
        loss(model.pyramid(images), masks).backward()

    With y₀ the mask, y_i = reduce(y_{i-1}), p_i = σ(d_i), all interpolated to y₀'s size (nearest), and means over pixels and images:

        Σ_{i=0..3} [mean w_i BCE(p_i, y_i) + mean (1 - (p_i y_i + 1) / (p_i + y_i - p_i y_i + 1))]
            + consistency · Σ_{i=1..3} mean |d_i - c_i|
        w_i = 1 + 5 |avg_31(y_i) - y_i|,   c_i = reduce(d_{i-1}), without gradient

    avg_31 is the mean over 31 × 31 pixels, zeros outside among them. `reduce` is `zoo.layers.image_pyramid.reduce`.

    Args:
        consistency: the last sum's weight.

    `forward` takes a `zoo.models.inspyrenet.Pyramid` and masks (B, 1, H, W) from 0 to 1 of d0's size, and gives a scalar, in float32 at
    least.

    Differences from the authors' code (plemeri/InSPyReNet, lib/InSPyReNet.py: forward_train; lib/optim/losses.py): cross-entropy is
    computed of logits; y_i are kept within 0 and 1, which rounding leaves.

    Raises:
        ValueError: a negative weight, at construction; masks of another shape than d0, in `forward`.
    """

    def __init__(self, consistency: float = 1e-4):
        super().__init__()
        if not consistency >= 0:
            raise InputError(f"consistency must be at least 0, got {consistency}")
        self.consistency = consistency

    def forward(self, pyramid: Pyramid, masks: Tensor) -> Tensor:
        if masks.shape != pyramid.d0.shape:
            raise InputError(f"masks must be of the logits' shape, {tuple(pyramid.d0.shape)}, got {tuple(masks.shape)}")
        with torch.autocast(masks.device.type, enabled=False):
            levels = [d.to(torch.promote_types(d.dtype, torch.float32)) for d in (pyramid.d0, pyramid.d1, pyramid.d2, pyramid.d3)]
            target, size = masks.to(levels[0].dtype), masks.shape[2:]
            loss = _of_pixels(levels[0], target)
            for finer, coarser in zip(levels, levels[1:], strict=False):
                target = reduce(target).clamp(0, 1)
                loss = loss + _of_pixels(F.interpolate(coarser, size), F.interpolate(target, size))
                loss = loss + self.consistency * F.interpolate((coarser - reduce(finer.detach())).abs(), size).mean()
            return loss


def _of_pixels(logits: Tensor, target: Tensor) -> Tensor:
    weight = 1 + 5 * (F.avg_pool2d(target, 31, 1, 15) - target).abs()
    p = logits.sigmoid()
    overlap = 1 - (p * target + 1) / (p + target - p * target + 1)
    return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean() + overlap.mean()
