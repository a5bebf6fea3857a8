"""NormGrad (arXiv 2004.02866): where the weights of a layer would be moved most by this picture's class.

A layer's activation a and the gradient g of the class's logit at it make, at every position u, the gradient of the weights of a
virtual layer put in there, which changes nothing as it starts (phase 1 of the paper). How large that is (phase 2) is the heat.

| phase | virtual layer | its gradient at u |
| --- | --- | --- |
| scaling | a factor for every channel | a ⊙ g |
| conv1x1 | 1×1 convolution | g aᵀ |
| conv3x3 | 3×3 convolution | g unfold₃(a)ᵀ |
| conv3x3_depthwise | depthwise 3×3 convolution | g ⊙ unfold₃(a) |
| bias | a bias for every channel | g |

Aggregates: norm; filter_norm, the norm of what is above 0; sum; max. NormGrad is conv1x1 with norm, ‖a‖ ‖g‖; "selective" is scaling with
filter_norm, the linear approximation scaling with sum. No matrix of channels × channels is made.

Differences from the authors' code (srebuffi/revisiting_saliency, resnet50_grid_saliency.py): maps have the size of the picture, theirs
224×224.
"""
import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import InputError

PHASES = ("scaling", "conv1x1", "conv3x3", "conv3x3_depthwise", "bias")
AGGREGATES = ("norm", "filter_norm", "sum", "max")
SMALLEST = 1e-12  # what a map's span is divided by, at least
META_RATE = 1e-4  # of the step of the meta variant, the paper's


def local_map(activation: Tensor, gradient: Tensor, phase: str = "conv1x1", aggregate: str = "norm") -> Tensor:
    """The size of a virtual layer's gradient at every position.

    Args:
        activation, gradient: (B, C, H, W).
        phase: one of `PHASES`.
        aggregate: one of `AGGREGATES`.

    Returns:
        (B, H, W).

    Raises:
        ValueError: an unknown phase or aggregate.
    """
    if phase not in PHASES or aggregate not in AGGREGATES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)} and aggregate one of {', '.join(AGGREGATES)}, "
                         f"got {phase!r} and {aggregate!r}")
    if phase in ("conv1x1", "conv3x3"):
        return _of_products(_unfold(activation).flatten(1, 2) if phase == "conv3x3" else activation, gradient, aggregate)
    if phase == "conv3x3_depthwise":
        vector = (_unfold(activation) * gradient[:, :, None]).flatten(1, 2)
    else:
        vector = activation * gradient if phase == "scaling" else gradient
    return {"sum": lambda: vector.sum(1), "max": lambda: vector.amax(1), "norm": lambda: vector.norm(dim=1),
            "filter_norm": lambda: vector.relu().norm(dim=1)}[aggregate]()


def _unfold(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 9, H, W), of zeros around the map."""
    return F.unfold(x, 3, padding=1).view(len(x), x.shape[1], 9, *x.shape[2:])


def _of_products(a: Tensor, g: Tensor, aggregate: str) -> Tensor:
    """Of all products of an element of a and one of g."""
    if aggregate == "sum":
        return a.sum(1) * g.sum(1)
    if aggregate == "norm":
        return a.norm(dim=1) * g.norm(dim=1)
    if aggregate == "filter_norm":  # products of two above 0, or two below
        return torch.hypot(a.relu().norm(dim=1) * g.relu().norm(dim=1), (-a).relu().norm(dim=1) * (-g).relu().norm(dim=1))
    ends = [[x.amax(1), x.amin(1)] for x in (a, g)]
    return torch.stack([one * other for one in ends[0] for other in ends[1]]).amax(0)


def normgrad(
    activations: Sequence[Tensor], gradients: Sequence[Tensor], size: tuple[int, int], phase: str = "conv1x1", aggregate: str = "norm",
) -> Tensor:
    """The product of the layers' maps, each resized to `size` (bilinear) and scaled to 0 … 1: (B, H, W)."""
    maps = [_scaled(F.interpolate(local_map(a, g, phase, aggregate)[:, None], size, mode="bilinear", align_corners=False))
            for a, g in zip(activations, gradients, strict=True)]
    return torch.stack(maps).prod(0)[:, 0]


def _scaled(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=-1)
    low, high = low.amin(-1, keepdim=True)[..., None], high.amax(-1, keepdim=True)[..., None]
    return (x - low) / (high - low).clamp_min(SMALLEST)


def at_layers(
    model: nn.Module, image: Tensor, target: int, layers: Sequence[nn.Module], as_map: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Activations of these layers, (1, C, H, W), and the gradients of the class's logit at them.

    Args:
        image: (1, C, H, W).
        as_map: makes (1, C, H, W) of what a layer puts out.
    """
    found: list[Tensor] = []

    def note(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        kept = output.clone()  # what follows may work in place
        found.append(kept)
        return kept

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        logit = model(image)[0, target]
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(logit, found)
    return [as_map(x.detach()) for x in found], [as_map(x) for x in gradients]


@contextlib.contextmanager
def moved(model: nn.Module, image: Tensor, target: int, rate: float = META_RATE) -> Iterator[None]:
    """The meta variant: inside, all weights are one step of gradient descent nearer to the class, on its cross entropy."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError(f"the meta variant of NormGrad moves weights, and none of {type(model).__name__} requires gradients")
    loss = F.cross_entropy(model(image), torch.tensor([target], device=image.device))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=rate)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
