"""Puts a mechanism into a CNN that is already built, and possibly trained."""
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.errors import InputError, near_misses, said_by
from zoo.models import MECHANISMS
from zoo.modules import evaluating, matching

NAMES = {name: family.ATTACHABLE for name, family in MECHANISMS.items() if hasattr(family, "ATTACHABLE")}


class Attached(nn.Module):
    """A layer that fades in: x + gate ⊙ (layer(x) − x), with one number per channel that starts at 0; or just layer(x).

    (B, dim, H, W) → (B, dim, H, W).
    """

    def __init__(self, layer: nn.Module, dim: int, keep_outputs: bool):
        super().__init__()
        self.layer = layer
        self.gate = nn.Parameter(torch.empty(dim)) if keep_outputs else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if self.gate is None else x + self.gate[:, None, None] * (y - x)


def attach(
    model: nn.Module,
    layer: str | Callable[..., nn.Module],
    where: str | Iterable[str] | None = None,
    *,
    keep_outputs: bool = True,
    example: Tensor | None = None,
    **layer_args: Any,
) -> nn.Module:
    """Lets a new layer work on what modules of `model` put out, in place, and returns the model.

        model = zoo.attach(timm.create_model("resnet50", pretrained=True), "das")
        model = zoo.attach(model, PolarizedSelfAttention, where="stages.*", layout="sequential")

    The new layers become children named `attached` of the modules that they follow, so old names in the state dict stay, and
    timm's groups of layers know the new parameters. One can attach again. Saving, loading (into a model with the same layers
    attached), copying, torch.compile and torch.export work as before. A pass or two on a small image finds widths.

    Args:
        model: any CNN; its modules that are followed put out one map (B, C, H, W). Blocks of transformers that work on tokens, or on
            maps with their channels last, are refused.
        layer: called with the width C (and `layer_args`) it gives a module that keeps the map's shape: a class, a partial, or
            the name of a mechanism with a layer for maps: a2n, atconv, das, halo, holistic, polarized, sk.
        where: names of modules, or patterns whose *, ? and [] stand for parts between dots ("layer?", "stages.*.blocks.0"). A
            plain sequence of blocks is followed after its last. Default: every residual block (any module that adds
            two maps and puts out a map of their shape), after the sum and what follows it in the block.
        keep_outputs: the layer fades in behind a gate of zeros per channel, see `Attached`: at the start the model computes
            exactly what it did, and the layer learns as soon as its gate has left zero. False leaves the gate out.
        example: an image for the passes, if (1, channels, 64, 64), or the size of a vision transformer, is not what the model takes.

    With its gate every layer keeps the outputs. Without, at the start: holistic keeps them by a factor of its own, a2n adds to the map,
    polarized parallel multiplies it by about 1 (two gates near ½), sequential by about ¼, das by gates around ½; atconv and sk, being
    convolutions, and halo replace it.

    Raises:
        InputError: no such layer, module or residual block, or a module or layer that this does not fit. The model is then
            as it was.
    """
    make = partial(_find_layer(layer), **layer_args)
    example = _example(model) if example is None else example
    with _Probe(model) as seen:
        _run(model, example)
    modules = dict(model.named_modules())
    targets = [seen.last_block(name) for name in (seen.residual_blocks() if where is None else matching(where, modules))]
    widths = {name: seen.width(name) for name in dict.fromkeys(targets)}
    if not widths:
        raise InputError(_why_no_blocks(model, seen))
    _check_channels_first(model, example, seen, widths)

    parameter = next(p for p in model.parameters() if p.is_floating_point())
    new = {}
    for name, width in widths.items():
        new[name] = Attached(make(width), width, keep_outputs).to(parameter.device, parameter.dtype)
        _check_shape(name, new[name].layer.eval(), seen.outputs[name][0])
        new[name].train(modules[name].training)
    undo = [_follow(modules[name], attached) for name, attached in new.items()]
    try:
        with _Probe(model) as now:
            _run(model, example)
        _check_calls(seen, now, new)
    except Exception:
        for step in undo:
            step()
        raise
    return model


def _follow(module: nn.Module, attached: nn.Module) -> Callable[[], object]:
    """Makes `module` pass on its output through `attached`; returns how to take that back."""
    if hasattr(module, "attached"):
        earlier = cast(nn.Sequential, module.attached)
        earlier.append(attached)
        return lambda: earlier.pop(-1)
    module.attached = nn.Sequential(attached)
    hook = module.register_forward_hook(_run_attached)

    def undo() -> None:
        hook.remove()
        del module.attached

    return undo


def _run_attached(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return cast(nn.Sequential, module.attached)(output)


def _find_layer(layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    if not isinstance(layer, str):
        return layer
    if layer not in NAMES:
        if layer in MECHANISMS:
            raise InputError(f"{layer} has no layer that turns a map, (B, C, H, W), into one of its shape, as {', '.join(NAMES)} have; "
                             f"zoo.list_models(mechanism={layer!r}) names models that are built on it")
        raise InputError(f"there is no layer {layer!r} to attach; {', '.join(NAMES)} are known{near_misses(layer, NAMES)}")
    return NAMES[layer]


def _why_no_blocks(model: nn.Module, seen: "_Probe") -> str:
    kind = type(model).__name__
    if not any(isinstance(output, Tensor) and output.ndim == 3 for outputs in seen.outputs.values() for output in outputs):
        return f"{kind} has no residual blocks; say with `where` which modules the layer follows"
    how = "a layer for tokens, such as zoo.layers.ContextBroadcast, has to be written into its blocks"
    if isinstance(model, VisionTransformer):
        how = "into its MLPs goes context broadcasting, by timm.create_model(NAME, mlp_layer=zoo.models.deit.BroadcastingMlp)"
    return (f"the blocks of {kind} work on tokens, (B, N, C), and attach is for maps, (B, C, H, W); their attention is changed by "
            f"zoo.replace_attention; {how}")


def _check_channels_first(model: nn.Module, example: Tensor, seen: "_Probe", names: Iterable[str]) -> None:
    """Raises InputError for a module whose maps have their height where the channels should be: it changes with the image's."""
    with _Probe(model) as other:
        try:
            _run(model, example[:, :, : example.shape[2] // 2])
        except InputError:  # it takes no other height
            other = None
    for name in names:
        shapes = [output.shape for output in seen.outputs[name]]
        moved = other is not None and [output.shape[1] for output in other.outputs[name]] != [shape[1] for shape in shapes]
        if moved or getattr(model, "output_fmt", "") == "NHWC":
            raise InputError(f"{name} puts out maps with their channels last, (B, H, W, C), of shape {tuple(shapes[0])}, and attach is for "
                             "(B, C, H, W); say with `where` which modules put out such maps, or write the layer into the model")


def _example(model: nn.Module) -> Tensor:
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        raise InputError(f"{type(model).__name__} has no convolutions; attach is for CNNs")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or (64, 64)  # which vision transformers insist on
    return torch.zeros(1, conv.in_channels, *size, device=conv.weight.device, dtype=conv.weight.dtype)


def _run(model: nn.Module, example: Tensor) -> None:
    """A pass that leaves no trace in the model."""
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    except Exception as error:
        shape = tuple(example.shape)
        raise InputError(f"{type(model).__name__} does not run on an example of shape {shape}: {said_by(error)}") from error


class _Probe(TorchFunctionMode):
    """Watches passes: what every module puts out, and which modules add two maps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.modules = dict(model.named_modules())
        self.outputs: dict[str, list[Any]] = {name: [] for name in self.modules}
        self.sums: dict[str, set[torch.Size]] = {name: set() for name in self.modules}
        self.running: list[str] = []

    def __enter__(self) -> Self:
        self.hooks = []
        for name, module in self.modules.items():
            self.hooks.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self.hooks.append(module.register_forward_hook(partial(self._leave, name)))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.append(name)

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.running.pop()
        self.outputs[name].append(output)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.running and getattr(func, "__name__", "").strip("_") in ("add", "iadd", "radd"):
            shapes = [x.shape for x in args[:2] if isinstance(x, Tensor)]
            if len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 4:
                self.sums[self.running[-1]].add(shapes[0])
        return result

    def residual_blocks(self) -> list[str]:
        return [name for name in self.modules if name and any(_is_map(y) and y.shape in self.sums[name] for y in self.outputs[name])]

    def last_block(self, name: str) -> str:
        """The module itself, or the last of the blocks that it runs one after the other: those are its children, and it has no
        place among them for anything that is not one of them."""
        module = self.modules[name]
        children = dict(module.named_children())
        children.pop("attached", None)
        if not children:
            return name
        last = f"{name}.{list(children)[-1]}"
        alike = len({type(child) for child in children.values()}) == 1 and self.outputs[name] and self.outputs[last]
        if isinstance(module, nn.Sequential) or alike and self.outputs[name][-1] is self.outputs[last][-1]:
            return self.last_block(last)
        return name

    def width(self, name: str) -> int:
        outputs = self.outputs[name]
        if not outputs:
            raise InputError(f"{name} does not run when the model does, so nothing can be attached to it")
        if isinstance(self.modules[name], nn.Sequential):
            raise InputError(f"{name} is an empty sequence, so nothing can be attached to it")
        if not all(map(_is_map, outputs)):
            shapes = ", ".join(str(tuple(y.shape)) if isinstance(y, Tensor) else type(y).__name__ for y in outputs)
            raise InputError(f"{name} puts out {shapes}, not one map (B, C, H, W)")
        widths = {y.shape[1] for y in outputs}
        if len(widths) > 1:
            raise InputError(f"{name} runs several times, with {' and '.join(map(str, sorted(widths)))} channels; attach to its parents")
        return widths.pop()


def _is_map(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4


def _check_shape(name: str, layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        shape = tuple(layer(x.clone()).shape)
    if shape != tuple(x.shape):
        raise InputError(f"{type(layer).__name__} at {name} turns a map of shape {tuple(x.shape)} into {shape}; it has to keep the shape")


def _check_calls(before: _Probe, after: _Probe, new: dict[str, Attached]) -> None:
    """Every new layer must have run as often as the module that it follows."""
    for name, attached in new.items():
        calls = next(len(after.outputs[path]) for path, module in after.modules.items() if module is attached)
        if calls != len(before.outputs[name]):
            raise InputError(f"nothing can be attached to {name}, which treats its children alike; attach to one of them")
