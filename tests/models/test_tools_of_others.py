"""What other people's tools put on the modules of a model is neither broken nor passed by: hooks, pruning, parametrizations, folding."""
import copy
from functools import partial

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize, prune
from torchvision.models.feature_extraction import NodePathTracer

import zoo
from zoo.models import unet

PARALLEL = "polarized_resnet_nano in parallel"  # its gates come from a formulation of their own
MODELS = [*(name for name in zoo.list_models("*_nano*") if name not in unet.ENCODERS), PARALLEL]
WITHOUT_PAIRS = [  # of a convolution and a batch norm
    "a2n_nano_x2", "deit_nano_patch16_224_cb", "han_nano_x2", "ifam_nano_patch16_224", "lambda_deit_nano_02", "litv2_nano",
    "moh_transnext_nano", "msinet_nano", "sum_nano", "vidat_nano_patch16_224", "vmamba_nano_v0"]
BEHIND_MASKS = (  # where gradients of the answer do not come: behind iFAM's hard masks, and InSPyReNet's coarser answers
    "stage_1.", "part_head", "decoder.start.conv5", "decoder.refine.1.logits", "decoder.refine.2.logits")
UNCALLED = {"stage_1", "stage_2"}  # its transformers, with parameters of their own, whose parts run one by one
PRODUCTS = (nn.Conv2d, nn.Conv3d, nn.Linear)
models = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    args = dict(layout="parallel") if name == PARALLEL else {}
    of_one = name.startswith(("inspyrenet", "msinet", "sum"))
    classes = {} if name in ("a2n_nano_x2", "han_nano_x2") else dict(num_classes=1 if of_one else 3)
    model = timm.create_model(name.split()[0], **classes, **args).eval()
    with torch.no_grad():  # so that no branch starts at zero, and no direction is missing
        for module in model.modules():
            if isinstance(module, PRODUCTS) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.01)
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
    torch.testing.assert_close(ours, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=1e-3)


@models
def test_what_has_hooks_is_called_and_what_they_keep_is_left_alone(name):
    """But by activations that timm lets work in place."""
    model, called, kept = make(name), set(), []

    def hook(module, args, out, path):
        called.add(path)
        if isinstance(module, PRODUCTS):
            kept.append((out, out.clone()))

    with_parameters = [path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    for path in with_parameters:
        model.get_submodule(path).register_forward_hook(partial(hook, path=path))
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    with torch.no_grad():
        out = model(image(model))
        same(out, make(name)(image(model)))
    assert not set(with_parameters) - UNCALLED - called
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
    assert all(module.weight_orig.grad is not None for path, module in products(model).items() if not path.startswith(BEHIND_MASKS))
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
    assert all(p.grad is not None for path, module in products(model).items() if not path.startswith(BEHIND_MASKS)
               for p in module.parametrizations.weight.parameters())


@models
def test_spectral_norm(name):
    model = make(name)
    for module in list(products(model).values()):
        parametrizations.spectral_norm(module)
    model.eval()
    plain = make(name)
    with torch.no_grad():
        for path, module in products(plain).items():
            module.weight.copy_(model.get_submodule(path).weight)
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
    assert bool(folded) == (name not in WITHOUT_PAIRS)


@pytest.mark.parametrize("name", [name for name in MODELS if "3d" not in name and "ifam" not in name])  # which draws noise in training
def test_batch_norms_freeze_and_thaw(name):
    model = make(name)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    assert not any(type(module) is nn.BatchNorm2d for module in frozen.modules())
    with torch.no_grad():
        expected = model(image(model))
        same(frozen.train(name != "dconnnet_nano")(image(model)), expected)  # which in training puts out connections
        same(unfreeze_batch_norm_2d(frozen).eval()(image(model)), expected)


@models
def test_torch_fuses_what_fx_traced_with_our_leaves(name):
    """`fuse` also traces, without leaves: of most families that ends in a TraceError."""
    model = make(name)
    tracer = NodePathTracer(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
    graph = fx.GraphModule(model, tracer.trace(model))
    fused = fuse(graph, no_trace=True)
    with torch.no_grad():
        same(fused(image(model)), model(image(model)))
    assert (batch_norms(fused) < batch_norms(graph)) == (name not in WITHOUT_PAIRS)


def batch_norms(graph: fx.GraphModule) -> int:
    called = [graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    return sum(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in called)
