import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import _linear
from zoo.layers._linear import linear


@pytest.mark.parametrize("shape", [(2, 7, 5, 20), (1, 1, 1, 20), (3, 1, 9, 20), (2, 4, 20), (2, 3, 5, 6), (0, 3, 20), (20,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer(shape, bias):
    layer = nn.Linear(shape[-1], 17, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    out, expected = linear(layer, x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    inputs, cotangent = [x, *layer.parameters()], torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    layer, x = nn.Linear(20, 17).to(dtype), torch.randn(2, 3, 5, 20, dtype=dtype)
    assert torch.equal(linear(layer, x), F.linear(x, layer.weight, layer.bias))


def test_layouts_and_autocast():
    layer, x = nn.Linear(20, 17), torch.randn(2, 20, 3, 5).permute(0, 2, 3, 1)
    torch.testing.assert_close(linear(layer, x), linear(layer, x.contiguous()))
    torch.testing.assert_close(linear(layer, x[:, ::2]), linear(layer, x[:, ::2].contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "weight", [torch.randn(17, 60)[:, 20:40], torch.randn(34, 20)[::2], torch.randn(20, 17).t()], ids=["columns", "rows", "transposed"])
def test_parts_of_matrices(weight):
    x = torch.randn(3, 20)
    assert _linear.takes(x, weight)
    torch.testing.assert_close(_linear.linear(x, weight), x @ weight.t())


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_second_derivatives_and_what_has_none(frozen):
    inputs = [torch.randn(shape, requires_grad=i != frozen) for i, shape in enumerate([(3, 4, 20), (17, 20), (17,)])]
    leaves = [x for x in inputs if x.requires_grad]
    found = []
    for function in (_linear.linear, F.linear):
        gradients = torch.autograd.grad(function(*inputs).square().sum(), leaves, create_graph=True)
        found.append((gradients, torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_transforms():
    layer, x = nn.Linear(20, 17), torch.randn(3, 4, 20)
    torch.testing.assert_close(torch.func.vmap(lambda x: linear(layer, x))(x), layer(x))
    for found, expected in zip(torch.func.jvp(lambda x: linear(layer, x), (x,), (x,)), (layer(x), x @ layer.weight.t()), strict=True):
        torch.testing.assert_close(found, expected)


def test_counters_see_forward_and_backward_products():
    x, weight = torch.randn(3, 4, 20, requires_grad=True), torch.randn(17, 20, requires_grad=True)
    with FlopCounterMode(display=False) as counter:  # its hooks on all modules have layers called, the operator it meets as it is
        out = _linear.linear(x, weight)
        assert counter.get_total_flops() == 2 * 12 * 20 * 17
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 20 * 17


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 17)

    def forward(self, x):
        return linear(self.layer, x)


def test_exports_as_a_linear_layer():
    program = torch.export.export(Wrapped(), (torch.randn(2, 3, 5, 20),))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators == {"aten.linear.default"}


def test_is_a_node_of_fx_graphs():
    assert [node.target for node in torch.fx.symbolic_trace(Wrapped()).graph.nodes] == ["x", "layer", "output"]


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_is_hooked_is_called(everywhere):
    model, called = Wrapped(), []
    register = nn.modules.module.register_module_forward_hook if everywhere else model.layer.register_forward_hook
    handle = register(lambda module, args, out: called.append(module))
    try:
        model(torch.randn(2, 3, 5, 20))
    finally:
        handle.remove()
    assert model.layer in called
