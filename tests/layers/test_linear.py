import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.layers._linear import linear


@pytest.mark.parametrize("shape", [(2, 7, 5, 6), (1, 1, 1, 6), (3, 1, 9, 6), (2, 4, 6), (6,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer(shape, bias):
    layer = nn.Linear(6, 4, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    out, expected = linear(layer, x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    inputs, cotangent = [x, *layer.parameters()], torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    layer, x = nn.Linear(6, 4).to(dtype), torch.randn(2, 3, 5, 6, dtype=dtype)
    assert torch.equal(linear(layer, x), F.linear(x, layer.weight, layer.bias))


def test_layouts_and_autocast():
    layer, x = nn.Linear(6, 4), torch.randn(2, 6, 3, 5).permute(0, 2, 3, 1)
    torch.testing.assert_close(linear(layer, x), linear(layer, x.contiguous()))
    torch.testing.assert_close(linear(layer, x[:, ::2]), linear(layer, x[:, ::2].contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, x).dtype == torch.bfloat16


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return linear(self.layer, x)


def test_exports_as_a_linear_layer():
    program = torch.export.export(Wrapped(), (torch.randn(2, 3, 5, 6),))
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
        model(torch.randn(2, 3, 5, 6))
    finally:
        handle.remove()
    assert model.layer in called
