"""What counters of operations see of the models, beside the products that an exported graph has (`model_table.macs`).

torch's own counter sees everything; fvcore the operators of the trace that it makes, among which torchvision's deformable convolution
and timm's `scaled_dot_product_attention` (TIMM_FUSED_ATTN=0 leaves it out) are none that it knows. thop and torchinfo see modules of
torch's own types, which all convolutions and linear layers are; products that are functions (attention's,
and the operators of `zoo.kernels`) they see in no formulation, and torchinfo counts a linear layer once for each image, at however
many positions it works. ptflops sees `torch.matmul` and its like beside modules, but neither the operator @ nor those of the zoo nor
`scaled_dot_product_attention`.
"""
import contextlib
import io

import ptflops
import pytest
import thop
import timm
import torch
import torchinfo
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.measuring import model_table
from zoo.models import unet

SIZE = (3, 64, 64)
UNITS = ["attnet_nano", "tap_fan_nano"]  # whose traces move or add numbers by convolutions with ones, and multiply nothing by that
BROADCAST = ["moh_transnext_nano"]  # products of operands that are broadcast, which fvcore counts by the first operand alone
BESIDE = ["ifam_nano_patch16_224"]  # what the logits do not need, here part logits, is not in the traces that fvcore counts
PRODUCTS = (nn.Conv2d, nn.Conv3d, nn.Linear)
MODELS = [name for name in zoo.list_models("*_nano*") if name not in unet.ENCODERS and "3d" not in name]
models = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    model = timm.create_model(name).eval()
    return model, torch.zeros(1, *SIZE)


def products(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Multiply-accumulates of every convolution and linear layer, by their names."""
    found, hooks = {}, []
    for path, module in model.named_modules():
        if isinstance(module, PRODUCTS):
            def count(module, args, out, path=path):
                found[path] = found.get(path, 0) + out.numel() * module.weight[0].numel()
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def counted_by_torch(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Of everything, and of `scaled_dot_product_attention`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "scaled_dot_product" in str(op))
    return counter.get_total_flops() // 2, attention // 2


@models
def test_torch_sees_everything(name):
    model, x = make(name)
    dense = name.startswith("biformer")  # on the CPU, where that is faster: more products than the definition has
    with zoo.kernels.default_backend("reference" if dense else "pytorch"):
        assert counted_by_torch(model, x)[0] == sum(model_table.products(name, SIZE).values())


@models
def test_thop_sees_every_convolution_and_linear_layer(name):
    model, x = make(name)
    expected = products(model, x)
    *_, layers = thop.profile(model, (x,), verbose=False, ret_layer_info=True)
    seen = {}

    def walk(layers, path):
        for child, (total, _, below) in layers.items():
            seen[f"{path}{child}"] = total
            walk(below, f"{path}{child}.")

    walk(layers, "")
    assert {path: seen[path] for path in expected} == pytest.approx(expected)


@models
def test_torchinfo_sees_every_convolution_and_linear_layer(name):
    model, x = make(name)
    expected = products(model, x)
    layers = {id(layer.module): layer for layer in torchinfo.summary(model, input_data=(x,), verbose=0).summary_list}
    seen = {module: layer.macs for module, layer in layers.items()}
    for path, count in expected.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):  # of which it takes the first axis for the batch, and sees no other
            count = module.weight.numel() * layers[id(module)].input_size[0]
        assert count <= seen[id(module)] <= 2 * count, path  # it counts biases as weights


# of DeiT and iFAM, as of timm's own, ptflops leaves out the linear layers inside timm's Attention, which it has a rule for
@pytest.mark.parametrize("name", [name for name in MODELS if "deit" not in name and "ifam" not in name])
def test_ptflops_sees_every_convolution_and_linear_layer(name):
    model, x = make(name)
    everything, least = counted_by_torch(model, x)[0], sum(products(model, x).values())
    with contextlib.redirect_stdout(io.StringIO()):
        count, _ = ptflops.get_model_complexity_info(
            model, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, backend="pytorch")
    assert least <= count < 1.2 * everything  # norms and activations too


@models
def test_fvcore_sees_the_products_of_the_definition(name):
    model, x = make(name)
    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    count = sum(analysis.by_operator()[op] for op in ("conv", "linear", "matmul", "mm", "bmm", "addmm", "einsum"))
    unknown = {op for op in analysis.unsupported_ops() if "::_" not in op and any(part in op for part in ("zoo", "conv", "attention"))}
    assert unknown <= {"torchvision::deform_conv2d", "aten::scaled_dot_product_attention"}
    expected = dict(model_table.products(name, SIZE))
    if "torchvision::deform_conv2d" in unknown:
        del expected["torchvision.deform_conv2d"]
    attention = 0
    if "aten::scaled_dot_product_attention" in unknown:  # of timm's modules: blocks of DeiT, the class token's of FAN
        attention = counted_by_torch(model, x)[1]
    least, most = sum(expected.values()) - attention, sum(expected.values())
    if name in UNITS:
        most *= 1.2
    if name in BROADCAST:
        least *= 0.99
    if name in BESIDE:
        least *= 0.97
    assert 0.99999 * least <= count <= most  # fvcore rounds
