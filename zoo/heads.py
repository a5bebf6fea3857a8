"""Which heads of attention matter to a network, and networks without the others (arXiv 1905.10650)."""
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from torch import Tensor, nn

from zoo.errors import InputError, first_few, near_misses
from zoo.layers import HiLoAttention, SelfAttention, TokenMixing
from zoo.layers.self_attention import RopeSelfAttention
from zoo.modules import evaluating


class _Kind(NamedTuple):
    """How a layer holds its heads: every linear layer puts out so many times heads · width numbers, and `proj` takes as many."""

    heads: tuple[str, ...]  # attributes with their number
    linears: dict[str, int]
    proj: str
    widths: tuple[str, ...] = ()  # attributes with heads · width
    suffix: str = ""  # of the name, where a layer has heads of several kinds
    least: int = 1  # heads that have to stay


_TIMMS = _Kind(("num_heads",), {"qkv": 3, "gate": 1}, "proj", ("attn_dim",), least=0)
_TIMMS_WITH_ROPE = _Kind(("num_heads", "num_kv_heads"), {"qkv": 3, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1}, "proj",
                         ("attn_dim", "kv_dim"), least=0)
KINDS: dict[type[nn.Module], tuple[_Kind, ...]] = {
    Attention: (_TIMMS,),
    AttentionRope: (_TIMMS_WITH_ROPE,),
    SelfAttention: (_TIMMS._replace(least=1),),
    RopeSelfAttention: (_TIMMS_WITH_ROPE._replace(least=1),),
    TokenMixing: (_Kind(("num_heads",), {"q": 1, "kv": 2}, "proj"),),
    HiLoAttention: (_Kind(("hi_heads",), {"hi_qkv": 3}, "hi_proj", suffix=".hi"),
                    _Kind(("lo_heads",), {"lo_q": 1, "lo_kv": 2}, "lo_proj", suffix=".lo")),
}


class _Heads(NamedTuple):
    layer: nn.Module
    kind: _Kind

    @property
    def proj(self) -> nn.Linear:
        return cast(nn.Linear, getattr(self.layer, self.kind.proj))

    @property
    def count(self) -> int:
        return cast(int, getattr(self.layer, self.kind.heads[0]))

    @property
    def mechanism(self) -> nn.Module | None:
        """What `zoo.replace_attention` has put between the projections."""
        return getattr(self.layer, "mechanism", None)

    def keep(self, heads: list[int]) -> None:
        """Leaves these heads, in place."""
        channels = _channels(heads, self.proj.in_features // self.count)
        for name, parts in self.kind.linears.items():
            linear = getattr(self.layer, name, None)
            if linear is not None:
                of_head = linear.out_features // (parts * self.count)  # 1 of a gate by the head
                kept = _channels(heads, of_head)
                rows = (torch.arange(parts)[:, None] * (self.count * of_head) + kept).flatten()
                _cut(linear, "weight", 0, rows)
                _cut(linear, "bias", 0, rows)
                linear.out_features = len(rows)
        _cut(self.proj, "weight", 1, channels)
        self.proj.in_features = len(channels)
        for names, size in ((self.kind.widths, len(channels)), (self.kind.heads, len(heads))):
            for name in names:
                setattr(self.layer, name, size)
        if self.mechanism is not None:
            cast(Any, self.mechanism).keep_heads(heads)


def _channels(heads: list[int], width: int) -> Tensor:
    return (torch.tensor(heads, dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()


def _cut(linear: nn.Linear, name: str, dim: int, kept: Tensor) -> None:
    old = getattr(linear, name)
    if old is not None:
        setattr(linear, name, nn.Parameter(old.detach().index_select(dim, kept.to(old.device)), requires_grad=old.requires_grad))


def head_importance(
    model: nn.Module, batches: Iterable[tuple[Tensor, Any]], loss: Callable[[Any, Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """How much the loss would change if a head put out nothing, to first order (arXiv 1905.10650, eq. 3).

        importance = zoo.head_importance(model, validation)
        zoo.prune_heads(model, 0.25, importance)                    # a quarter of all heads, the least important

        I_lh = Σ_tokens |⟨∂L/∂c_lh, c_lh⟩|,  c the head's output before the layer's projection;  every layer's I divided by its norm

    Args:
        model: any network with attention of the kinds that `zoo.prune_heads` takes. It is run in evaluation mode and left as it was,
            without gradients.
        batches: inputs and targets, such as a DataLoader; they are moved to the model's device.
        loss: (output, targets) → the sum over the images; default the cross entropy of classes.

    Returns:
        By the name of the layer (of HiLo's two kinds of heads with `.hi` and `.lo`), (heads,), float64, on the CPU. Norm 1 in every
        layer, or 0 where the loss does not depend on it.

    Difference from the authors' code (pmichel31415/pytorch-pretrained-BERT, examples/classifier_eval.py): sums, not means over tokens,
    which the norm takes out again.

    Raises:
        InputError: a network without such layers, or no batches.
    """
    layers = _heads_of(model)
    total = {name: torch.zeros(heads.count, dtype=torch.float64) for name, heads in layers.items()}
    loss, seen = loss or _cross_entropy, 0
    device = next(model.parameters()).device
    for inputs, targets in batches:
        with evaluating(model), torch.enable_grad(), _outputs(layers) as outputs:
            value = loss(model(inputs.to(device)), targets.to(device) if isinstance(targets, Tensor) else targets)
            taken = list(outputs)  # checkpointed layers run again
            gradients = torch.autograd.grad(value, [c for _, c in taken], allow_unused=True)
        for (name, c), gradient in zip(taken, gradients, strict=True):
            if gradient is not None and layers[name].count:
                products = (c.detach() * gradient).unflatten(-1, (layers[name].count, -1)).double().sum(-1)
                total[name] += products.abs().flatten(0, -2).sum(0).cpu()
        seen += 1
    if not seen:
        raise InputError("head_importance was given no batches")
    return {name: F.normalize(value, dim=0) for name, value in total.items()}


def prune_heads(
    model: nn.Module, heads: Mapping[str, Iterable[int]] | float, importance: Mapping[str, Tensor] | None = None, at_least: int = 1,
) -> dict[str, list[int]]:
    """Takes heads out of attention, in place: their rows of q, k and v and their columns of the projection are gone.

        removed = zoo.prune_heads(model, {"blocks.0.attn": [1, 4]})
        torch.save({"heads": removed, "state_dict": model.state_dict()}, "pruned.pt")

        model = timm.create_model(NAME)                                             # the same network again
        zoo.prune_heads(model, saved["heads"])
        model.load_state_dict(saved["state_dict"])

    The outputs are those of the network whose heads put out zeros. Parameters are new: optimizers are made afterwards. Biases of
    projections stay, also those of layers without any head left.

    Layers: timm's `Attention` and `AttentionRope` (ViT, DeiT, DINO, CLIP, …), ours in FAN (`TokenMixing`) and LITv2 (`HiLoAttention`,
    whose two kinds of heads keep one each at least). Not BiFormer, whose routes are made of all heads' queries and keys. Of what
    `zoo.replace_attention` puts into timm's all but "moh", whose router chooses among the heads, and "rela", which norms them together;
    one head stays there. A mechanism of one's own has `heads_are_independent = True` and `keep_heads(heads)`.

    Args:
        heads: by names of layers, the heads to take out; or which share of all heads, in (0, 1), by `importance`.
        importance: by names of layers, see `head_importance`. Needed for a share.
        at_least: heads that every layer keeps, those of most importance.

    Returns:
        What was taken out, by names of layers.

    Raises:
        InputError: no such layer or head, fewer heads than `at_least` left, a layer whose heads cannot be told apart, a share without
            importance. The model is then as it was.
    """
    layers = _heads_of(model)
    if not isinstance(heads, Mapping):
        heads = _least_important(layers, heads, importance, at_least)
    removed = {}
    for name, chosen in heads.items():
        chosen = sorted(set(chosen))
        if name not in layers:
            raise InputError(f"the model has no layer {name!r} with heads{near_misses(name, layers)}; it has {first_few(layers)}")
        count = layers[name].count
        wrong = [head for head in chosen if not 0 <= head < count]
        if wrong:
            raise InputError(f"{name} has heads 0 to {count - 1}, and was to lose {first_few(wrong)}")
        least = max(at_least, layers[name].kind.least)
        if count - len(chosen) < least and chosen:
            raise InputError(f"{name} has {count} heads, of which at least {least} have to stay, and was to lose {len(chosen)}")
        removed[name] = chosen
    for name, chosen in removed.items():
        if chosen:
            layers[name].keep([head for head in range(layers[name].count) if head not in chosen])
    return removed


def regroup_heads(model: nn.Module, heads: Mapping[str, int]) -> nn.Module:
    """Gives layers of attention another number of heads, in place, and returns the model: the same channels in more or fewer groups.

        zoo.regroup_heads(vit, {"blocks.11.attn": 16})

    Parameters stay as they are, by shape and name; outputs change, for heads are of another width d, and logits are divided by its square
    root. For networks that are trained so, as UNIP's (arXiv 2502.02257), whose last block has as many heads as the teacher's.

    Args:
        heads: by names of layers, of timm's `Attention` without norms of queries and keys, the number of heads; it divides their width.

    Raises:
        InputError: no such layer, or a number that does not divide its width. The model is then as it was.
    """
    modules = {name: module for name, module in model.named_modules() if type(module).forward is Attention.forward}
    for name, count in heads.items():
        layer: Any = modules.get(name)
        if layer is None:
            raise InputError(f"the model has no layer {name!r} of timm's Attention{near_misses(name, modules)}; "
                             f"it has {first_few(list(modules) or ['none'])}")
        if not isinstance(layer.q_norm, nn.Identity):
            raise InputError(f"{name} has norms of its heads' queries and keys, which are for {layer.head_dim} channels")
        width = layer.proj.in_features
        if count < 1 or width % count:
            raise InputError(f"{name} has {width} channels, which {count!r} heads do not divide")
    for name, count in heads.items():
        layer = modules[name]
        layer.num_heads, layer.head_dim = count, layer.proj.in_features // count
        layer.scale = layer.head_dim**-0.5
    return model


def _least_important(
    layers: Mapping[str, _Heads], share: float, importance: Mapping[str, Tensor] | None, at_least: int,
) -> dict[str, list[int]]:
    if not 0 < share < 1:
        raise InputError(f"heads must be a share between 0 and 1, or heads by names of layers, got {share!r}")
    if importance is None:
        raise InputError("a share of heads is taken out by importance: prune_heads(model, share, zoo.head_importance(model, batches))")
    shapes = {name: heads.count for name, heads in layers.items()}
    given = {name: len(value) for name, value in importance.items()}
    if shapes != given:
        raise InputError(f"importance is of {given}, and the model has {shapes} heads")
    ranked = sorted((float(value), name, head) for name, of in importance.items() for head, value in enumerate(of))
    kept = {(name, head) for name, of in importance.items()
            for head in of.argsort(descending=True, stable=True)[: max(at_least, layers[name].kind.least)].tolist()}
    allowed = [(name, head) for _, name, head in ranked if (name, head) not in kept]
    chosen: dict[str, list[int]] = {}
    for name, head in allowed[: int(share * len(ranked))]:
        chosen.setdefault(name, []).append(head)
    return chosen


def _heads_of(model: nn.Module) -> dict[str, _Heads]:
    """The layers with heads, by name. Raises InputError where there are none, or the outputs of heads are mixed before the projection."""
    found = {}
    for name, module in model.named_modules():
        for kind in _kinds_of(module):
            if getattr(module, kind.heads[0]) or not kind.suffix:
                found[name + kind.suffix or type(module).__name__] = _Heads(module, kind)
    if not found:
        raise InputError(f"{type(model).__name__} has no attention whose heads can be told apart; "
                         f"{', '.join(kind.__name__ for kind in KINDS)} have such heads")
    mixed = next((name for name, module in model.named_modules() if getattr(module, "rope_mixed", False)), None)
    if mixed is not None:
        raise InputError(f"{mixed or type(model).__name__} rotates every head by frequencies of its own, which are not the layers'")
    for name, heads in found.items():
        if not isinstance(getattr(heads.layer, "norm", nn.Identity()), nn.Identity):
            raise InputError(f"{name} has a norm over all its heads before the projection, so that none goes without changing the others")
        if getattr(heads.layer, "num_kv_heads", heads.count) != heads.count:
            raise InputError(f"{name} has keys and values that several heads share, and heads cannot be taken out one by one")
        if heads.mechanism is not None and not getattr(heads.mechanism, "heads_are_independent", False):
            raise InputError(f"{name} has {heads.mechanism} between its projections, whose heads depend on each other, so that none goes "
                             "without changing the others")
    return found


def _kinds_of(module: nn.Module) -> tuple[_Kind, ...]:
    """Of the class itself, and of those made of it that run as it does."""
    return next((kinds for layer, kinds in KINDS.items() if isinstance(module, layer) and type(module).forward is layer.forward), ())


@contextlib.contextmanager
def _outputs(layers: Mapping[str, _Heads]) -> Iterator[list[tuple[str, Tensor]]]:
    """What the heads of every layer put out while the block runs, as it goes into the projection."""
    outputs: list[tuple[str, Tensor]] = []

    def take(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(proj: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            c = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()  # of frozen networks
            outputs.append((name, c))
            return (c,)
        return hook

    hooks = [heads.proj.register_forward_pre_hook(take(name)) for name, heads in layers.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _cross_entropy(output: Any, targets: Any) -> Tensor:
    return F.cross_entropy(output, targets, reduction="sum")
