"""σReparam: weights whose largest singular value is a parameter of its own (arXiv 2303.06296)."""
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zoo.errors import InputError, first_few
from zoo.modules import matching

NORMS = nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm
Layer = nn.Linear | nn.Conv2d
AUTHORS_NAMES = {  # the others only report, or are `weight` again
    "spectral_normed_weight.u": "0.u", "sigma": "0.sigma", "spectral_normed_weight.weight": "", "weight": "original",
    "spectral_normed_weight.spectral_norm": "", "effective_spectral_norm": ""}


class SigmaReparametrization(nn.Module):
    """A weight W as γ W / σ(W), with a learned number γ (arXiv 2303.06296, section 2.2), to be registered by `torch.nn.utils.parametrize`.

    σ(W) is the largest singular value of what the layer multiplies with: W as (out, in · kernel), of a grouped convolution with such a
    matrix per group on the diagonal. It comes of one step of the power iteration from the vector u, without gradients of its own:

        v = Wu / |Wu|,  u' = Wᵀv / |Wᵀv|,  σ = vᵀ W u';  in training u ← u'

    Computed in at least float32, also under autocast. A backward pass that runs the layer again, as gradient checkpointing does, takes the
    vectors of the last forward pass and no further step. At the start γ = σ(W) and u is the singular vector: the weight is what it was.

    Parameters: `sigma`, (1,), γ. Buffers: `u`, (groups, in / groups · kernel).
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, groups: int = 1):
        super().__init__()
        with torch.no_grad():
            u, sigma = _first_singular(_matrices(weight, groups))
        self.sigma = nn.Parameter(sigma.amax().to(weight.dtype).reshape(1))
        self.register_buffer("u", u)
        self.register_buffer("v", u.new_zeros(groups, weight.shape[0] // groups), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrices = _matrices(weight, len(self.u))
            with torch.no_grad():
                u, v = self.u.to(matrices.dtype), self.v.to(matrices.dtype)
                if not _runs_again():
                    v = F.normalize(_times(matrices, u), dim=1)
                    u = F.normalize(_times(matrices.mT, v), dim=1)
                    if self.training:
                        self.u.copy_(u)
                        self.v.copy_(v)
            largest = (v * _times(matrices, u)).sum(1).amax()
            return (self.sigma.to(matrices.dtype) / largest * weight).to(weight.dtype)


def reparametrize(model: nn.Module, where: str | Iterable[str] | None = None, *, keep_norms: bool = True) -> nn.Module:
    """Gives the weights of linear layers and 2-D convolutions of `model` a learned spectral norm, in place: σReparam (arXiv 2303.06296).

        model = zoo.reparametrize(timm.create_model("vit_tiny_patch16_224", num_classes=0), keep_norms=False)
        ...                                                                    # train
        zoo.fold(model)                                                       # plain layers again, to export

    Every such weight W becomes γ W / σ(W), see `SigmaReparametrization`. The outputs stay what they are, but for rounding, unless norms
    are taken out. Names in the state dict become torch's: `parametrizations.weight.original`, `….0.sigma`, `….0.u`; weights are loaded
    before, or into a model that has been reparametrized alike. Files of the authors' code load through
    `zoo.reparametrization.checkpoint_filter_fn`. Optimizers made before do not know the new parameters.

    Args:
        where: names of modules, or patterns as for `zoo.attach`: those modules and all within them. Default: the whole model.
        keep_norms: False also replaces batch, group, instance, layer and RMS norms by nothing, as the authors' vision transformers have it.

    Each forward pass in training is one step of the power iteration; layers that run several times in one take several, but within
    `torch.nn.utils.parametrize.cached()`. With DistributedDataParallel the vectors are the same everywhere: they are broadcast buffers,
    and follow from the weights alone.

    Differences from the authors' code (apple/ml-sigma-reparam, vision/layers.py): given weights are kept; grouped convolutions; σ in
    float32 under autocast; no buffers that only report. The output layer is meant to stay plain, as their example has it: leave it out by
    `where`.

    Raises:
        InputError: no such module or layer, one whose weights are all 0 or not finite, are shared with another or have a parametrization
            already. The model is then as it was.
    """
    modules = dict(model.named_modules())
    chosen = modules if where is None else {
        inner: modules[inner] for name in matching(where, modules) for inner in modules if f"{inner}.".startswith(f"{name}.")}
    layers = {name: module for name, module in chosen.items() if isinstance(module, Layer)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer or 2-D convolution to reparametrize"
                         + ("" if where is None else f" in {where!r}"))
    _check(model, layers)
    made = {name: SigmaReparametrization(layer.weight, getattr(layer, "groups", 1)) for name, layer in layers.items()}
    for name, layer in layers.items():
        sigma = made[name].eval()  # registering runs it, which is no step of training
        parametrize.register_parametrization(layer, "weight", sigma)
        sigma.train(layer.training)
    if not keep_norms:
        for name, module in chosen.items():
            if name and isinstance(module, NORMS):
                parent, _, child = name.rpartition(".")
                setattr(modules[parent], child, nn.Identity())
    return model


def fold(model: nn.Module) -> nn.Module:
    """Makes what `zoo.reparametrize` reparametrized plain layers again, in place, whose weights are γ W / σ(W) as in evaluation.

    Raises:
        InputError: nothing is reparametrized, or a weight has a further parametrization.
    """
    layers = {name: module for name, module in model.named_modules() if _sigma_of(module) is not None}
    if not layers:
        raise InputError(f"{type(model).__name__} has no layer that zoo.reparametrize has reparametrized")
    further = [name for name, layer in layers.items() if len(_parametrizations(layer)) > 1]
    if further:
        raise InputError(f"the weights of {first_few(further)} have further parametrizations, which have to be removed first")
    for layer in layers.values():
        cast(SigmaReparametrization, _sigma_of(layer)).eval()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the authors' model under the names, and in the shapes, of a reparametrized one."""
    own, converted = model.state_dict(), {}
    for name, value in state.items():
        entry = next((entry for entry in AUTHORS_NAMES if f".{name}".endswith(f".{entry}")), "")
        prefix = name.removesuffix(entry)
        if f"{prefix}sigma" not in state or not entry:
            converted[name] = value
        elif new := AUTHORS_NAMES[entry]:
            renamed = f"{prefix}parametrizations.weight.{new}"
            converted[renamed] = value.reshape(own[renamed].shape) if renamed in own else value
    return converted


def _check(model: nn.Module, layers: dict[str, Layer]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise InputError(f"the weight of {name or type(layer).__name__} has a parametrization already")
        weight = layer.weight.detach()
        if weight.is_meta:
            raise InputError(f"the weights of {name or type(layer).__name__} are on the meta device and have no values to start from")
        if len(owners[id(layer.weight)]) > 1:
            raise InputError(f"{' and '.join(owners[id(layer.weight)])} are one parameter, which cannot have two spectral norms; "
                             "say with `where` which layers to reparametrize")
        if not weight.isfinite().all() or not weight.any():
            what = "all 0" if weight.isfinite().all() else "not finite"
            raise InputError(f"the weights of {name or type(layer).__name__} are {what}, which has no spectral norm to divide by; "
                             "say with `where` which layers to reparametrize")


def _parametrizations(layer: nn.Module) -> Sequence[nn.Module]:
    return list(cast(Any, layer.parametrizations).weight) if parametrize.is_parametrized(layer, "weight") else []


def _sigma_of(layer: nn.Module) -> SigmaReparametrization | None:
    return next((step for step in _parametrizations(layer) if isinstance(step, SigmaReparametrization)), None)


def _matrices(weight: Tensor, groups: int) -> Tensor:
    """(groups, out / groups, in / groups · kernel), at least float32."""
    return weight.reshape(groups, weight.shape[0] // groups, -1).to(torch.promote_types(weight.dtype, torch.float32))


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None]).squeeze(-1)


def _first_singular(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The right singular vectors (groups, n) of the largest singular values, and these, (groups,)."""
    wide = matrices.shape[1] < matrices.shape[2]
    exact = matrices.double()
    squares, vectors = torch.linalg.eigh(exact @ exact.mT if wide else exact.mT @ exact)
    first = vectors[..., -1]
    u = F.normalize(_times(exact.mT, first), dim=1) if wide else first
    return u.to(matrices.dtype), squares[:, -1].clamp(min=0).sqrt().to(matrices.dtype)


def _runs_again() -> bool:
    """Whether a backward pass is running, which asks for what the last forward pass computed."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
