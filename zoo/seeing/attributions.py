"""Which pixels speak for a class: heat over a picture, with captum and grad-cam (`pip install "zoo-attention[visualize]"`)."""
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import InputError, near_misses, require
from zoo.seeing import ATTRIBUTIONS, normgrad

STEPS = 32  # of integrated gradients
LAYERS = 4  # of NormGrad
SMALLEST = 1e-6  # added to what FullGrad divides by
# Norms over the last axis; other kinds of LayerNorm are given maps (B, C, H, W) and normalize their channels.
LAST_AXIS_NORMS = (nn.LayerNorm, timm.layers.LayerNorm, timm.layers.LayerNormFp32, timm.layers.LayerNormAct,
                   timm.layers.LayerNormActFp32)


def check_method(method: str) -> None:
    """Raises InputError unless `method` is one of `ATTRIBUTIONS`."""
    if method not in ATTRIBUTIONS:
        raise InputError(f"there is no attribution {method!r}{near_misses(method, ATTRIBUTIONS)}; {', '.join(ATTRIBUTIONS)} are known")


def heat(model: nn.Module, image: Tensor, target: int, method: str) -> Tensor:
    """How much every position of `image`, (1, C, H, W), speaks for class number `target`: (H, W), at least 0.

    The model is left as it was: its gradients, its mode, and no hooks.

    Args:
        method: "gradcam" (arXiv 1610.02391), at what the model's head is given, the last map; in networks of tokens one block
            before, since a head that reads the class token alone is not moved by the last block's other tokens.
            "integrated_gradients" (arXiv 1703.01365), from grey, `STEPS` steps. "fullgrad" (arXiv 1905.00780, as in the
            authors' code, idiap/fullgrad-saliency, saliency/fullgrad.py), with the biases that `BiasGradients` finds. "normgrad"
            (arXiv 2004.02866, see `zoo.seeing.normgrad`), the product over up to `LAYERS` of the stages or blocks, from 0 to 1;
            "normgrad_meta", the same after a step of gradient descent towards the class.

    Raises:
        InputError: an unknown method, or a model that the method does not suit.
    """
    check_method(method)
    require("seeing", "visualize", "captum", "pytorch_grad_cam")
    with undisturbed(model), torch.enable_grad():
        return METHODS[method](model, image.detach().clone().requires_grad_(), target)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; mode and gradients of all parts as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


class BiasGradients:
    """A model's biases that act on maps, each with the gradient of the output at the place where it is added.

    Calling it runs the model with an image (1, C, H, W); when the result has been propagated back, `biases`, each (C), and
    `gradients`, each (1, C, h, w), are there in pairs, one for every run of a layer that moved the result, and `layers` has the
    layers' names. The pairs are those of

    - convolutions, 2-d batch norms with what their statistics subtract, group norms, and layer norms over channels;
    - linear layers and layer norms on maps (1, H, W, C), and on all tokens (1, N, C) where the model's features are such tokens.

    Norms that end in an activation count before it. Not counted are biases without a place on the picture, such as the classifier's,
    those that layers have as parameters of their own, and those of layers that work on windows cut out of a map.

    In a network of these layers, linear ones and ReLUs, and without biases elsewhere, a logit is the sum of all biases times their
    gradients, of the input times its gradient, and of the classifier's bias.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.biases, self.gradients, self.layers = [], [], []

    def __call__(self, image: Tensor) -> Tensor:
        self.release()
        size = (image.shape[2], image.shape[3])
        tokens = grid_of_tokens(self.model, _features(self.model, image), size)
        hooks = []
        for name, layer in self.model.named_modules():
            if (bias := _bias(layer)) is None:
                continue

            def watch(_, given: Any, output: object = None, name: str = name, layer: nn.Module = layer, bias: Tensor = bias) -> None:
                value = given[0] if output is None else output
                if isinstance(value, Tensor) and value.requires_grad and _as_map(value, layer, size, tokens) is not None:
                    value.register_hook(lambda gradient: self._note(name, bias, cast(Tensor, _as_map(gradient, layer, size, tokens))))

            # What comes before a norm's activation is what its next part is given.
            after = getattr(layer, "drop", None) or getattr(layer, "act", None)
            hooks.append(layer.register_forward_hook(watch) if after is None else after.register_forward_pre_hook(watch))
        try:
            return self.model(image)
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, bias: Tensor, gradient: Tensor) -> None:
        self.layers.append(name)
        self.biases.append(bias)
        self.gradients.append(gradient.detach())

    def release(self) -> None:
        """Forgets the pairs."""
        for found in (self.biases, self.gradients, self.layers):
            found.clear()


class _Split(nn.Module):
    """The model, with a module, `features`, that what its head is given runs through."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.features = model, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.features(self.model.forward_features(x)))


def _gradcam(model: nn.Module, image: Tensor, target: int) -> Tensor:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    split, features = _Split(model), _features(model, image)
    tokens = grid_of_tokens(model, features, (image.shape[2], image.shape[3]))
    if not tokens:
        _check_map("gradcam", model, features)
    layer = _block_before_last(model, image) if tokens else split.features

    def as_map(x: Tensor) -> Tensor:
        if tokens:
            x = _place(x, tokens)
        elif getattr(model, "output_fmt", "NCHW") == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return x.clone()  # what follows may work in place

    cam = GradCAM(split, [layer], as_map)
    try:
        targets = cast(list[nn.Module], [ClassifierOutputTarget(target)])  # any callables will do
        return torch.from_numpy(cam(image, targets)[0])
    finally:
        cam.activations_and_grads.release()


def _integrated_gradients(model: nn.Module, image: Tensor, target: int) -> Tensor:
    from captum.attr import IntegratedGradients
    found = IntegratedGradients(model).attribute(image, target=target, n_steps=STEPS, internal_batch_size=8)
    return found[0].abs().sum(0).detach()


def _fullgrad(model: nn.Module, image: Tensor, target: int) -> Tensor:
    """Σ over the input's gradient times itself and every bias times its gradient: |part|, scaled to 0 … 1 over all channels and
    positions of the part together, interpolated between corners, summed over channels."""
    pairs = BiasGradients(model)
    gradient, = torch.autograd.grad(pairs(image)[0, target], image)
    parts = [image.detach() * gradient]
    parts += [bias[:, None, None] * gradient for bias, gradient in zip(pairs.biases, pairs.gradients, strict=True)]
    maps = (F.interpolate(_scaled(part), image.shape[2:], mode="bilinear", align_corners=True).sum(1)[0] for part in parts)
    return cast(Tensor, sum(maps))


def _scaled(part: Tensor) -> Tensor:
    size = part.abs() - part.abs().min()
    return size / (size.max() + SMALLEST)


def _normgrad(model: nn.Module, image: Tensor, target: int) -> Tensor:
    size, split = (image.shape[2], image.shape[3]), _Split(model)
    layers = _layers_with_maps(model, image)
    if not layers:
        _check_map("normgrad", model, _features(model, image))
        layers = [split.features]
    activations, gradients = normgrad.at_layers(split, image, target, layers, lambda x: cast(Tensor, _placed(model, x, size)))
    return normgrad.normgrad(activations, gradients, size)[0]


def _normgrad_meta(model: nn.Module, image: Tensor, target: int) -> Tensor:
    with normgrad.moved(model, image, target):
        return _normgrad(model, image, target)


METHODS: dict[str, Callable[[nn.Module, Tensor, int], Tensor]] = dict(
    zip(ATTRIBUTIONS, (_gradcam, _integrated_gradients, _fullgrad, _normgrad, _normgrad_meta), strict=True))


def class_sensitivity(most: Tensor, least: Tensor) -> float:
    """Correlation (Pearson's, over positions) of the heat of the most and of the least probable class, (H, W) both.

    Near 1 the heat is a property of the picture and says little about the class (arXiv 2004.02866, section 5). NaN where one of them
    is the same everywhere.
    """
    return float(torch.corrcoef(torch.stack([most.flatten(), least.flatten()]).double())[0, 1])

def _check_map(method: str, model: nn.Module, features: object) -> None:
    if not isinstance(features, Tensor) or features.ndim != 4:
        came = f"of shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise InputError(f"{method} needs features that lie on the picture; those of {type(model).__name__} are {came}")


Tokens = tuple[int, int, int]  # how many come before the patches, rows, columns


def _features(model: nn.Module, image: Tensor) -> object:
    with torch.no_grad():
        return cast(Any, model).forward_features(image)


def grid_of_tokens(model: nn.Module, features: object, size: tuple[int, int]) -> Tokens | None:
    """How features that are tokens, (1, N, C), lie on an image of this size; None if they do not, or are something else."""
    if not isinstance(features, Tensor) or features.ndim != 3:
        return None
    for first in [cast(int, model.num_prefix_tokens)] if hasattr(model, "num_prefix_tokens") else range(3):
        if found := grid(features.shape[1] - first, size):
            return first, *found
    return None


def grid(count: int, size: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of so many tokens on an image of this size; None if they do not lie on it."""
    return next(((rows, count // rows) for rows in range(1, count + 1) if count % rows == 0 and _fits(rows, count // rows, size)), None)


def _layers_with_maps(model: nn.Module, image: Tensor) -> list[nn.Module]:
    """Up to `LAYERS` of the modules that the model names as the sources of its features, evenly spread, which put out maps or tokens.

    Not the last of tokens, see `heat`; none where it names others than it has.
    """
    size, found, modules = (image.shape[2], image.shape[3]), [], dict(model.named_modules())

    def note(module: nn.Module, _: tuple, output: object) -> None:
        if module not in found and isinstance(output, Tensor) and _placed(model, output, size) is not None:
            found.append(module)

    named = [info["module"] for info in getattr(model, "feature_info", [])]
    hooks = [modules[name].register_forward_hook(note) for name in named if name in modules]
    try:
        features = _features(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    if grid_of_tokens(model, features, size):
        found = found[:-1]
    count = min(LAYERS, len(found))
    return [found[(i + 1) * len(found) // count - 1] for i in range(count)]


def _placed(model: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor | None:
    """What a stage or a block puts out, as (1, C, H, W); None if it does not lie on an image of this size."""
    if x.ndim == 3:
        tokens = grid_of_tokens(model, x, size)
        return _place(x, tokens) if tokens else None
    if x.ndim != 4:
        return None
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    x = x.permute(0, 3, 1, 2) if channels_last else x
    return x if _fits(x.shape[2], x.shape[3], size) else None


def _block_before_last(model: nn.Module, image: Tensor) -> nn.Module:
    """The last module but one of those that the model names as the sources of its features and that run on the way to its logits."""
    ran = []
    modules = [model.get_submodule(info["module"]) for info in getattr(model, "feature_info", [])]
    hooks = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in modules]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if len(ran) < 2:
        raise InputError(f"gradcam looks at the last block but one of a network of tokens; {type(model).__name__} has {len(ran)}")
    return ran[-2]


def _fits(rows: int, columns: int, size: tuple[int, ...]) -> bool:
    """Whether a map can be an image of this size divided by some stride, rounded up."""
    return -size[0] < rows * size[1] - columns * size[0] < size[1]


def _place(x: Tensor, tokens: Tokens) -> Tensor:
    """(B, N, C) to (B, C, H, W), of the patches, which come last."""
    _, rows, columns = tokens
    return x[:, -rows * columns:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def _as_map(x: Tensor, layer: nn.Module, size: tuple[int, int], tokens: Tokens | None) -> Tensor | None:
    """What a layer gives, as (1, C, H, W); None if that does not lie on the image."""
    if len(x) != 1:
        return None
    if not isinstance(layer, nn.Linear) and type(layer) not in LAST_AXIS_NORMS:
        return x if x.ndim == 4 else None
    if x.ndim == 4:
        return x.permute(0, 3, 1, 2) if _fits(x.shape[1], x.shape[2], size) else None
    if x.ndim == 3 and tokens and x.shape[1] == tokens[0] + tokens[1] * tokens[2]:
        return _place(x, tokens)
    return None


def _bias(layer: nn.Module) -> Tensor | None:
    """What a layer adds to every position of its output, (C); None if nothing, or if it is none of those that are counted."""
    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
        scale = (cast(Tensor, layer.running_var) + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight)
        return ((0 if layer.bias is None else layer.bias) - layer.running_mean * scale).detach()
    if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.Linear)):
        return None if layer.bias is None or layer.bias.ndim != 1 else layer.bias.detach()
    return None
