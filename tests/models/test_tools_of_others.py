"""What other people's tools put on the modules of a model is neither broken nor passed by: hooks, pruning, parametrizations, folding."""
import copy

import pytest
import timm
import torch
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize, prune

import zoo
from zoo.models import unet

MODELS = [name for name in zoo.list_models("*_nano*") if name not in unet.ENCODERS] + [
    "attention_unet_sknet_nano", "fan_tiny_8_p4_hybrid", "polarized_resnet50_p"]
PRODUCTS = (nn.Conv2d, nn.Conv3d, nn.Linear)
models = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    with torch.no_grad():  # so that no branch starts at zero
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return model


def image(model: nn.Module) -> torch.Tensor:
    sizes = (8, 8, 8) if getattr(model, "spatial_dims", 2) == 3 else (32, 32)
    return torch.randn(1, model.in_chans, *sizes, generator=torch.Generator().manual_seed(1))


def products(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PRODUCTS)}


def same(ours: torch.Tensor, theirs: torch.Tensor):
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


@models
def test_every_module_with_parameters_is_called(name):
    model, called = make(name), set()
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, path=path: called.add(path))
    with torch.no_grad():
        out = model(image(model))
    passed_by = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))} - called
    assert not passed_by
    same(out, make(name)(image(model)))


@models
def test_outputs_that_hooks_keep_stay_as_they_were(name):
    """Nothing that a convolution or linear layer put out is written to afterwards, but by timm's activations and theirs who asked."""
    model, kept = make(name), []
    for module in products(model).values():
        module.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    activations = [module for module in model.modules() if getattr(module, "inplace", False)]
    for module in activations:
        module.inplace = False
    with torch.no_grad():
        model(image(model))
    assert kept and all(torch.equal(out, copied) for out, copied in kept)


@models
def test_pruned_weights_are_those_that_are_used(name):
    """Also after a step of an optimizer, which changes what the mask is applied to."""
    model = make(name)
    for i, module in enumerate(products(model).values()):
        if i % 2 and module.weight.shape[0] > 1:
            prune.ln_structured(module, "weight", amount=0.3, n=2, dim=0)
        else:
            prune.l1_unstructured(module, "weight", amount=0.3)
    with torch.no_grad():
        for module in products(model).values():
            module.weight_orig.mul_(1.2)
    pruned = model(image(model))
    pruned.square().sum().backward()
    assert all(module.weight_orig.grad is not None for module in products(model).values())
    with torch.no_grad():
        for module in products(model).values():
            prune.remove(module, "weight")
        same(pruned.detach(), model(image(model)))


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


@models
def test_parametrizations_are_obeyed_and_learn(name):
    model, plain = make(name), make(name)
    with torch.no_grad():
        for module in products(plain).values():
            module.weight /= 2
    for i, module in enumerate(list(products(model).values())):
        if i % 2:
            module.weight.data /= 2
            parametrizations.weight_norm(module)
        else:
            parametrize.register_parametrization(module, "weight", Halved())
    out = model(image(model))
    same(out, plain(image(model)))
    out.square().sum().backward()
    assert all(p.grad is not None for module in products(model).values() for p in module.parametrizations.weight.parameters())


@models
def test_spectral_norm(name):
    model = make(name)
    for module in list(products(model).values()):
        parametrizations.spectral_norm(module)
    plain = copy.deepcopy(model)
    for module in list(products(plain).values()):
        parametrize.remove_parametrizations(module, "weight")
    with torch.no_grad():
        same(model(image(model)), plain(image(model)))


@models
def test_batch_norms_fold_into_convolutions(name):
    model = make(name)
    expected, folded = model(image(model)), 0
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
            pair = isinstance(conv, nn.Conv2d | nn.Conv3d) and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
            numbered = conv_name[-1:] == norm_name[-1:]  # conv1, bn1
            if pair and conv.out_channels == norm.num_features and (isinstance(parent, nn.Sequential) or numbered):
                activation = getattr(norm, "act", nn.Identity())  # of timm's joint modules
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, activation)
                folded += 1
    with torch.no_grad():
        same(model(image(model)), expected.detach())
    assert folded or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@models
def test_batch_norms_freeze_and_thaw(name):
    model = make(name)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    assert not any(type(module) is nn.BatchNorm2d for module in frozen.modules())
    with torch.no_grad():
        expected = model(image(model))
        same(frozen.train()(image(model)) if "drop" not in name else expected, frozen.eval()(image(model)))
        same(frozen.eval()(image(model)), expected)
        same(unfreeze_batch_norm_2d(frozen).eval()(image(model)), expected)
