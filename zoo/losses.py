"""Losses on what happens inside a network, and on what is more than logits of classes."""
import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from zoo.errors import InputError
from zoo.kernels import attention_cross_entropy, attention_similarity
from zoo.layers import (
    HedgehogAttention,
    MixtureOfHeads,
    NormalizedAttention,
    SparsifinerAttention,
    bilateral_voting,
    connectivity_target,
)
from zoo.layers.connectivity import NEIGHBOURS
from zoo.layers.image_pyramid import reduce
from zoo.layers.multiple_instance import BagOutput
from zoo.models.inspyrenet import Pyramid
from zoo.modules import WatchingAttention
from zoo.part_losses import (  # noqa: F401  which are many, and stand by themselves
    PartDiscoveryLoss,
    concentration,
    enforced_presence,
    equivariance,
    orthogonality,
    pixel_entropy,
    presence,
    total_variation,
)

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
        raise InputError("a loss of attention needs fused attention where gradients are checkpointed: "
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


class TeacherAttentionLoss(nn.Module):
    """How far a network's attention is from that of a larger network's block (UNIP, arXiv 2502.02257, section 4); to be made small.

        teacher = timm.create_model("vit_large_patch16_224.mae", pretrained=True).eval()
        zoo.regroup_heads(vit, {"blocks.11.attn": 16})            # as many as the teacher has
        imitation = zoo.TeacherAttentionLoss(teacher, block=17)
        imitation(vit, images).backward()

        mean over images, heads, queries of KL(softmax(T) ‖ softmax(S)),   T, S = scale · Q Kᵀ of all tokens, (B, heads, N, N)

    Either network is one whose tokens attend to one another by torch's fused attention: any timm vision transformer. Both see the same
    images as the same number of tokens; widths may differ. The teacher runs as it is, without gradients, and is no part of this module:
    neither among its parameters nor in its state. What follows the network's logits (its values, projections, the MLP of that block)
    gets no gradient. Matrices of attention are kept for one block of either.

    Args:
        teacher: on the images' device.
        block: of the teacher, counted from 0, negative from the end. The authors take 17, the 18th of MAE-L's 24.
        network_block: of the network that learns, which is its last in the paper.

    Difference from the authors' code (casiatao/UNIP, UNIP_pretraining/models_unip.py): its other divergence, "CE", takes the heads for
    classes, and is left out.

    Raises:
        ValueError: in `forward`, a network without such a block, attention with a bias or a mask, or shapes of attention that differ.
    """

    def __init__(self, teacher: nn.Module, block: int, network_block: int = -1):
        super().__init__()
        self._teacher, self.block, self.network_block = (teacher,), block, network_block

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """The loss, a scalar of at least float32; images (B, …)."""
        teacher, = self._teacher
        with torch.no_grad():
            expected = _logits_of_attention(teacher, images, "block", self.block)
        found = _logits_of_attention(model, images, "network_block", self.network_block)
        if found.shape[:2] != expected.shape[:2]:
            raise InputError(f"block {self.network_block} of {type(model).__name__} has {found.shape[1]} heads, and block {self.block} of "
                             f"the teacher {expected.shape[1]}; zoo.regroup_heads gives it as many")
        if found.shape != expected.shape:
            raise InputError(f"{type(model).__name__} sees images as {found.shape[-1]} tokens, and the teacher as {expected.shape[-1]}")
        divergence = F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True)
        return divergence.sum(-1).mean()

    def extra_repr(self) -> str:
        return f"block={self.block}, network_block={self.network_block}"


class _Logits(WatchingAttention):
    """Adds to `found` queries, keys and scale of every attention between all tokens of the images, or None for those with a bias."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.found: list[tuple[Tensor, Tensor, float | None] | None] = []

    def watch(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> None:
        if query.ndim == 4 and query.shape[0] == self.batch and query.shape == key.shape:
            self.found.append(None if attn_mask is not None or is_causal else (query, key, scale))


def _logits_of_attention(model: nn.Module, images: Tensor, argument: str, block: int) -> Tensor:
    """Of one of the blocks, (B, heads, N, N)."""
    with fused(model), _Logits(len(images)) as seen:
        model(images)
    blocks = len(seen.found)
    if not blocks:
        raise InputError(f"{type(model).__name__} has no layer in which all tokens of an image attend to one another, "
                         "which the teacher's attention is for")
    if not -blocks <= block < blocks:
        raise InputError(f"{argument} must be from {-blocks} to {blocks - 1} for {type(model).__name__}, got {block}")
    chosen = seen.found[block]
    if chosen is None:
        raise InputError(f"block {block} of {type(model).__name__} adds a bias or a mask to its attention, and the loss takes attention of "
                         "queries and keys alone")
    q, k, scale = chosen
    with torch.autocast(q.device.type, enabled=False):
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        return q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)


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


class ConnectivityLoss(nn.Module):
    """The loss of BiconNet (arXiv 2103.00334, section 3.4) or of DconnNet (arXiv 2304.00145, section 3.4) of connections of pixels.

    With the masks m of the labels, con = `connectivity_target`(m), the logits z of connections, c = σ(z), votes v_i and masks p of c by
    `bilateral_voting`, edge = [0 < Σ_i con_i < 8], q = min_i v_i · edge, λ = `votes`, and BCE the mean over all numbers:

        bicon                   BCE(p, m) + (1 - λ) BCE(c, con) + BCE(q, 0) + λ BCE(v, con) + dice(p, m)
        dconn, one class        BCE(p, m) + BCE(c, con) + Σ BCE(q, 0) / Σ q + λ BCE(v, con) + dice(p, m)
        dconn, several classes  CE(s, labels) + BCE(c, con) + Σ BCE(q, 0) / Σ q + λ BCE(v, con) + Σ_{k ≥ 1} dice(softmax(s)_k, m_k)

    where s, masks, and the votes in q = min_i σ(v_i) · edge are of z itself in the last. Σ BCE(q, 0) / Σ q is at least 1, which
    it comes to as q comes to 0. dice is 1 - (2 Σ p m + ε) / (Σ p + Σ m + ε), the
    sums of bicon over every column of pixels with ε = 1e-3, those of dconn over a picture with ε = 1e-4; then the mean.

    Args:
        variant: "bicon", which is for one class, or "dconn".
        votes: λ; the authors of DconnNet have 0 for CHASE-DB1 and 0.2 else.
        auxiliary: weight of every map but the first where a network gives several, as DconnNet in training.
        ignore_index: the label of pixels that do not count.

    Args of `forward`:
        maps: logits z (B, 8, H, W) of one class, or (B, 8 K, H, W) of K > 1; or several such.
        labels: (B, H, W), int64: 1 is the one class, or 0 … K - 1.

    Returns:
        The loss, a scalar of float32.

    Differences from the authors' code (Zyun-Y/BiconNets, general/train/connect_loss.py; Zyun-Y/DconnNet, connect_loss.py): without
    edges Σ BCE(q, 0) / Σ q is 0, theirs 0 / 0; BCE(c, con) is of logits, so that it has a gradient wherever they are; their weights of
    dice by the sizes of retinal fluids are not here.

    Raises:
        InputError: arguments outside what is said above, at construction; maps or labels of other shapes, in `forward`.
    """

    def __init__(self, variant: Literal["bicon", "dconn"] = "dconn", votes: float = 0.2, auxiliary: float = 0.3,
                 ignore_index: int | None = None):
        super().__init__()
        if variant not in ("bicon", "dconn"):
            raise InputError(f"variant must be bicon or dconn, got {variant!r}")
        if not 0 <= votes <= 1:
            raise InputError(f"votes must be from 0 to 1, got {votes}")
        if not auxiliary >= 0:
            raise InputError(f"auxiliary must be at least 0, got {auxiliary}")
        self.variant, self.votes, self.auxiliary, self.ignore_index = variant, votes, auxiliary, ignore_index

    def forward(self, maps: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        first, *others = [maps] if isinstance(maps, Tensor) else maps
        loss = self._of(first, labels)
        for other in others:
            loss = loss + self.auxiliary * self._of(other, labels)
        return loss

    def _of(self, maps: Tensor, labels: Tensor) -> Tensor:
        if maps.ndim != 4 or not maps.shape[1] or maps.shape[1] % NEIGHBOURS:
            raise InputError(f"maps must be (B, 8 K, H, W), the connections of K classes, got shape {tuple(maps.shape)}")
        if labels.shape != maps[:, 0].shape:
            raise InputError(f"labels must be {tuple(maps[:, 0].shape)}, one of every pixel, got shape {tuple(labels.shape)}")
        classes = maps.shape[1] // NEIGHBOURS
        if classes > 1 and self.variant == "bicon":
            raise InputError(f"the loss of BiconNet is for one class, whose connections are 8 maps; these are {maps.shape[1]}, "
                             "for which variant='dconn' is")
        with torch.autocast(maps.device.type, enabled=False):
            z = maps.float()
            numbers = torch.arange(classes, device=labels.device) if classes > 1 else torch.ones(1, device=labels.device)
            masks = (labels[:, None] == numbers[:, None, None]).float()
            valid = None if self.ignore_index is None else (labels[:, None] != self.ignore_index).float()
            con = connectivity_target(masks)
            together = con.unflatten(1, (classes, NEIGHBOURS)).sum(2)
            edge = ((together > 0) & (together < NEIGHBOURS)).float()
            p, v = bilateral_voting(z.sigmoid())
            connections = _mean(F.binary_cross_entropy_with_logits(z, con, reduction="none"), valid)
            voted = _mean(F.binary_cross_entropy(v.flatten(1, 2), con, reduction="none"), valid)
            if classes == 1:
                q = v.amin(2) * edge
                region = _mean(F.binary_cross_entropy(p, masks, reduction="none"), valid)
                dice: dict[str, Any] = dict(dims=(1, 2), epsilon=1e-3) if self.variant == "bicon" else dict(dims=(2, 3), epsilon=1e-4)
                region = region + _dice(p, masks, valid, **dice)
            else:
                scores, of_logits = bilateral_voting(z)
                q = of_logits.sigmoid().amin(2) * edge
                ignored = -100 if self.ignore_index is None else self.ignore_index  # torch's, without any
                region = _mean(F.cross_entropy(scores, labels, reduction="none", ignore_index=ignored)[:, None], valid)
                shares = scores.softmax(1)
                region = region + (classes - 1) * _dice(shares[:, 1:], masks[:, 1:], valid, (2, 3), 1e-4)
            q = q if valid is None else q * valid
            apart = F.binary_cross_entropy(q, torch.zeros_like(q), reduction="none")
            if self.variant == "bicon":
                return region + (1 - self.votes) * connections + _mean(apart, valid) + self.votes * voted
            weight = q.sum()
            apart = apart.sum() / torch.where(weight > 0, weight, 1.0)
            return region + connections + apart + self.votes * voted

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, votes={self.votes}, auxiliary={self.auxiliary}, ignore_index={self.ignore_index}"


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Over all numbers (B, C, H, W), or those of the pixels where valid (B, 1, H, W) is 1; 0 where there are none."""
    return values.mean() if valid is None else (values * valid).sum() / (valid.sum() * values.shape[1]).clamp(min=1)


def _dice(p: Tensor, masks: Tensor, valid: Tensor | None, dims: tuple[int, ...], epsilon: float) -> Tensor:
    """1 - (2 Σ p m + ε) / (Σ p + Σ m + ε), sums over `dims` of (B, C, H, W), then the mean."""
    p, masks = (p, masks) if valid is None else (p * valid, masks * valid)
    both, either = (p * masks).sum(dims), p.sum(dims) + masks.sum(dims)
    return (1 - (2 * both + epsilon) / (either + epsilon)).mean()


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
