"""Replaces the attention of a vision transformer that is already built, and possibly trained."""
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent, AttentionPoolPrr, RotAttentionPool2d
from torch import Tensor, nn

from zoo.errors import InputError, first_few, near_misses, said_by
from zoo.layers import HedgehogAttention, MixtureOfHeadAttention, NormalizedAttention, PyramidSparseAttention, SparsifinerAttention
from zoo.layers.normalized_attention import NORMALIZERS
from zoo.layers.self_attention import AROUND, GATES, AroundMechanism, SelfAttention
from zoo.modules import evaluating, matching

NAMES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(NormalizedAttention, normalizer=name) for name in NORMALIZERS}, "hedgehog": HedgehogAttention,
    "moh": MixtureOfHeadAttention, "pyramid_sparse": PyramidSparseAttention, "sparsifiner": SparsifinerAttention}
POOLS = (AttentionPoolLatent, AttentionPoolPrr, AttentionPool2d, RotAttentionPool2d)  # of tokens, which they do not put out
TOKENS = 5  # of the passes that try what is unknown


def replace_attention(
    model: nn.Module,
    layer: str | Callable[..., nn.Module],
    where: str | Iterable[str] | None = None,
    *,
    gate: str | None = None,
    **layer_args: Any,
) -> nn.Module:
    """Puts another mechanism into the attention of a vision transformer, in place, and returns the model.

        vit = zoo.replace_attention(timm.create_model("vit_small_patch16_224", pretrained=True), "entmax15")
        vit = zoo.replace_attention(vit, "softmax", where="blocks.[0-5]", gate="head")

    What stands between projections, between queries, keys and values and the heads' outputs, is replaced. Everything else stays: the
    projections, norms, rotary embeddings, relative positions, masks, dropouts and hooks; all parameters are the same objects under
    the same names, and files of the old model load but for what is new, which has names of a child `mechanism` or `gate`. Saving,
    copying, torch.compile, torch.export, checkpointing and timm's resizing work as before.

    Args:
        model: a model of timm's `Attention` (ViT, DeiT, DINOv2, CLIP, SigLIP, …), `AttentionRope` and `EvaAttention` (EVA, DINOv3, PE, …),
            BEiT's, Swin's and relative position ViTs' attention, or with modules that compute the same from timm's fields.
        layer: a name: softmax, entmax15, sparsemax, entmax, cog, rela (see `zoo.layers.NormalizedAttention`), hedgehog (see
            `zoo.layers.HedgehogAttention`), moh (see `zoo.layers.MixtureOfHeadAttention`), pyramid_sparse (see
            `zoo.layers.PyramidSparseAttention`), sparsifiner (see `zoo.layers.SparsifinerAttention`); or what, called with num_heads,
            head_dim and `layer_args`, gives a module that turns q, k, v (B, heads, N, d), a bias of the logits (or None), the scale and a
            rate of dropout into (B, heads, N, d); one whose class has `takes_bias = False` is for attention without relative positions and
            dropout; one whose class has `takes_tokens = True` gets the tokens (B, N, dim) after these, and what makes it their dim.
        where: names of modules, or patterns whose *, ? and [] stand for parts between dots ("blocks.*.attn"), which are
            attention or hold some. Default: all attention of the model but that of pools.
        gate: "head" or "element": the outputs are multiplied by a sigmoid of one number per token and head, or channel (then
            it is timm's own gate), which starts at ½, and `proj.weight` is doubled. None: gates stay as they are.

    At the start "softmax" keeps the outputs, and a gate keeps them exactly: ½ · 2. All others change them: "entmax" approaches softmax
    as its `alpha` is set near 1, "sparsifiner" is softmax with keep=1, pyramid_sparse approximates softmax on long rows, and moh leaves
    out heads, and keeps the outputs where all of them are active at equal scores; the others have to be trained for.

    Raises:
        InputError: no such layer or module, attention that the layer does not fit, by its name and with the reason. The model is
            then as it was.
    """
    found = _find_layer(layer)
    if gate not in (None, *GATES):
        raise InputError(f"gate must be None, 'head' or 'element', got {gate!r}")
    modules = dict(model.named_modules())
    targets: dict[str, Any] = {name: modules[name] for name in _targets(model, modules, where)}
    kinds = {name: _kind(name, module) for name, module in targets.items()}
    make = _maker(found, model, layer_args)
    new = {name: _mechanism(make, name, module) for name, module in targets.items()}
    gates = {name: _gate(name, module, gate) for name, module in targets.items()} if gate else {}
    for name, module in targets.items():  # nothing fails from here on
        module.__class__ = kinds[name]
        module.mechanism = new[name]
        if gate:
            module.gate = gates[name]
    for made in new.values():
        if hasattr(made, "join"):
            cast(Any, made).join(model)
    with torch.no_grad():
        for weight in {id(targets[name].proj.weight): targets[name].proj.weight for name in gates}.values():
            weight.mul_(2)  # exact
    return model


def _find_layer(layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    if not isinstance(layer, str):
        return layer
    if layer not in NAMES:
        raise InputError(f"there is no attention {layer!r}; {', '.join(NAMES)} are known{near_misses(layer, NAMES)}")
    return NAMES[layer]


def _maker(layer: Callable[..., Any], model: nn.Module, layer_args: dict[str, Any]) -> Callable[..., nn.Module]:
    """What a mechanism is made by; one may take what only the model knows."""
    if not hasattr(layer, "for_model"):
        return partial(layer, **layer_args)
    try:
        return cast(Any, layer).for_model(model, **layer_args)
    except ValueError as error:
        raise InputError(f"no attention for {type(model).__name__} can be made: {error}") from error


def _is_attention(module: nn.Module) -> bool:
    """By its looks: heads, and projections around them."""
    return isinstance(getattr(module, "num_heads", None), int) and isinstance(getattr(module, "proj", None), nn.Module) and any(
        isinstance(getattr(module, name, None), nn.Module) for name in ("qkv", "q_proj", "q", "kv"))


def _targets(model: nn.Module, modules: dict[str, nn.Module], where: str | Iterable[str] | None) -> list[str]:
    attention = [name for name, module in modules.items() if _is_attention(module)]
    if not attention:
        raise InputError(f"{type(model).__name__} holds no attention with timm's fields (num_heads, qkv, proj) that could be replaced")
    if where is None:
        return [name for name in attention if not isinstance(modules[name], POOLS)]
    chosen = set()
    for pattern in [where] if isinstance(where, str) else where:
        named = matching(pattern, modules)
        inside = {other for other in attention for name in named if other == name or other.startswith(f"{name}.")}
        if not inside:
            what = ", ".join(f"{name} ({type(modules[name]).__name__})" for name in named[:4])
            raise InputError(f"where={pattern!r} names {what}, which is no attention and holds none; attention is {first_few(attention)}")
        chosen.update(inside)
    return [name for name in attention if name in chosen]


def _kind(name: str, module: nn.Module) -> type[nn.Module]:
    """The class that the module gets; InputError if none computes what it does."""
    if isinstance(module, AroundMechanism):
        return type(module)
    if "forward" in vars(module):
        raise InputError(f"{name} has a forward of its own, which somebody has put in the place of {type(module).__name__}'s, so that it "
                         "cannot be replaced")
    kind = next((around for timms, around in AROUND.items() if isinstance(module, timms) and type(module).forward is timms.forward), None)
    if kind is not None:
        return kind
    what = f"{name} is {type(module).__name__}"
    fields = ("qkv", "proj", "num_heads", "scale", "attn_drop", "proj_drop")
    missing = [field for field in fields if getattr(module, field, None) is None]
    if missing:
        raise InputError(f"{what}, which lacks {' and '.join(missing)} of timm's Attention, so that it cannot be replaced")
    known = {"self", "x", "attn_mask", "is_causal"}
    others = [argument for argument in inspect.signature(type(module).forward).parameters if argument not in known]
    if others:
        raise InputError(f"{what}, which is called with {' and '.join(others)}, as no attention is that could be replaced")
    _check_computes_attention(what, module)
    return SelfAttention


def _check_computes_attention(what: str, module: Any) -> None:
    """Runs the module and softmax attention of its fields on the same tokens, and raises InputError if they differ."""
    other = "it computes something other than softmax attention of its queries, keys and values, so that it cannot be replaced"
    weight, generator = next(module.parameters()), torch.Generator().manual_seed(0)
    kind, had = type(module), dict(vars(module)["_modules"])
    try:
        with evaluating(module), torch.no_grad():
            x = torch.randn(2, TOKENS, module.qkv.weight.shape[1], generator=generator).to(weight.device, weight.dtype)
            expected = module(x)
            head_dim = module.qkv.weight.shape[0] // (3 * module.num_heads)
            module.mechanism = NormalizedAttention(module.num_heads, head_dim)
            module.__class__ = SelfAttention
            bound = 10 * torch.finfo(x.dtype).eps ** 0.75
            same = torch.allclose(module(x), expected, atol=bound * float(expected.abs().max()), rtol=bound)
    except Exception as error:  # others' modules stumble in their own ways
        raise InputError(f"{what}, and {other}: {said_by(error)}") from error
    finally:
        module.__class__ = kind
        vars(module)["_modules"].clear()
        vars(module)["_modules"].update(had)
    if not same:
        raise InputError(f"{what}, and {other}")


def _projection(module: Any) -> nn.Linear:
    return module.q_proj if module.qkv is None else module.qkv


def _mechanism(make: Callable[..., nn.Module], name: str, module: Any) -> nn.Module:
    weight = _projection(module).weight
    head_dim = weight.shape[0] // module.num_heads // (1 if module.qkv is None else 3)
    try:
        width = {"dim": weight.shape[1]} if _takes_dim(make) else {}
        made = make(num_heads=module.num_heads, head_dim=head_dim, **width).to(module.proj.weight.device, module.proj.weight.dtype)
    except (TypeError, ValueError) as error:
        raise InputError(f"no attention for {name} can be made: {error}") from error
    biased = next((bias for bias in ("relative_position_bias_table", "rel_pos") if getattr(module, bias, None) is not None), None)
    if not getattr(made, "takes_bias", True):
        what = f"{type(made).__name__} does not fit {name}, {type(module).__name__}"
        if biased:
            raise InputError(f"{what}, which adds relative positions to its logits, for which it has no place")
        if module.attn_drop.p:
            raise InputError(f"{what}, which drops attention weights (attn_drop {module.attn_drop.p}), as it cannot")
    _check_shape(made, name, module.num_heads, head_dim, weight.shape[1])
    return made.train(module.training)


def _takes_dim(make: Callable[..., nn.Module]) -> bool:
    try:
        return "dim" in inspect.signature(make).parameters
    except ValueError:  # arguments that do not fit, which the call names better
        return False


def _check_shape(made: nn.Module, name: str, num_heads: int, head_dim: int, dim: int) -> None:
    weight = next(made.parameters(), torch.empty(0))
    if weight.is_meta:
        return
    q, k, v = torch.zeros(3, 1, num_heads, getattr(made, "num_tokens", TOKENS), head_dim, device=weight.device, dtype=weight.dtype)
    tokens = (q.new_zeros(1, q.shape[2], dim),) if getattr(made, "takes_tokens", False) else ()
    try:
        with torch.no_grad():
            out = made.eval()(q, k, v, None, 1.0, 0.0, *tokens)
    except Exception as error:  # anybody's mechanism in its own way
        raise InputError(f"{type(made).__name__} for {name} does not run on queries, keys and values of shape {tuple(q.shape)}: "
                         f"{said_by(error)}") from error
    if not isinstance(out, Tensor) or out.shape != q.shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"{type(made).__name__} for {name} turns queries, keys and values of shape {tuple(q.shape)} into {found}; "
                         "it has to keep the shape")


def _gate(name: str, module: Any, gate: str) -> nn.Linear:
    if getattr(module, "gate", None) is not None:
        raise InputError(f"{name} has a gate already; gate=None keeps it")
    projection, proj = _projection(module), module.proj
    biased = projection.bias is not None or getattr(module, "q_bias", None) is not None  # timm's gate has a bias where these have
    width = module.num_heads if gate == "head" else proj.weight.shape[1]
    made = nn.Linear(projection.weight.shape[1], width, biased, device=proj.weight.device, dtype=proj.weight.dtype)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made.train(module.training)
