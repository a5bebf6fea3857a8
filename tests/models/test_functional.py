"""Models under torch.func, in forward mode and differentiated twice: right, or refused by torch's own fused attention."""
import contextlib

import pytest
import timm
import torch
from shallow import SHALLOW
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo

LIGHT = [name for name in zoo.list_models("*_nano*") if not zoo.models.is_dense(name)]
TIMMS_ATTENTION = (  # in blocks of DeiT and iFAM, and in FAN's class attention
    "deit_nano_patch16_224_cb", "ifam_nano_patch16_224", "lambda_deit_nano_02", "tap_fan_nano")
DENSE = ("attention_unet_nano", "attention_unet3d_nano", "dconnnet_nano", "inspyrenet_nano", "msinet_nano", "sum_nano", "a2n_nano_x2",
         "han_nano_x2")
families = pytest.mark.parametrize("name", [*LIGHT, *DENSE])
# InSPyReNet's coarser answers hand on no derivatives, so that differences of its answers are not its derivatives.
whole = pytest.mark.parametrize("name", [name for name in (*LIGHT, *DENSE) if name != "inspyrenet_nano"])


def _settle(model: nn.Module) -> None:
    """Gives batch norms the statistics of an image: with those of a new network logits are of millions, and all is at a bound."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 64, dtype=torch.float64))


def case(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model in double precision no gradient of which is zero from the start, two images and a direction."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SHALLOW.get(name, {})).double()
    if name == "inspyrenet_nano":
        _settle(model)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    size = (9, 8, 6) if name == "attention_unet3d_nano" else (37, 42)
    x = torch.randn(2, model.in_chans, *size, dtype=torch.float64)
    return model, x, torch.randn_like(x)


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@families
def test_gradients_of_every_sample(name):
    model, x, _ = case(name)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def of_sample(parameters, sample):
        return functional_call(model, (parameters, buffers), (sample[None],)).square().sum()

    found = vmap(grad(of_sample), (None, 0))(parameters, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss(model, x[i : i + 1]), parameters.values(), materialize_grads=True)
        norm = max(gradient.abs().max() for gradient in expected)
        assert all((found[key][i] - gradient).abs().max() <= 1e-10 * norm for key, gradient in zip(parameters, expected, strict=True))


@whole
def test_forward_mode(name):
    model, x, direction = case(name)
    step = 1e-7
    with sdpa_kernel(SDPBackend.MATH) if name in TIMMS_ATTENTION else contextlib.nullcontext():
        _, found = jvp(model, (x,), (direction,))
        expected = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
    assert close(found, expected, 1e-5)


@whole
def test_second_derivatives(name):
    """Gradients of gradients' products with a direction; where torch's fused attention has none, it says so."""
    model, x, direction = case(name)

    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(model, x), x, create_graph=True)[0]

    def curvature() -> torch.Tensor:
        at = x.clone().requires_grad_()
        first, = torch.autograd.grad(loss(model, at), at, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), at)[0]

    step = 1e-7
    expected = (slope(x + step * direction) - slope(x - step * direction)) / (2 * step)
    try:
        found = curvature()
    except RuntimeError as error:
        assert "derivative for aten::_scaled_dot_product" in str(error)
        with sdpa_kernel(SDPBackend.MATH):
            found = curvature()
    assert close(found, expected, 1e-5)
