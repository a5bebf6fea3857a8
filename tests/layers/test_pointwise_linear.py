import pytest
import torch
import torch.nn.functional as F

from zoo.layers import PointwiseLinear


@pytest.mark.parametrize("shape", [(2, 7, 5, 6), (1, 1, 1, 6), (3, 1, 9, 6), (2, 4, 6), (6,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer(shape, bias):
    layer = PointwiseLinear(6, 4, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    out, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    inputs, cotangent = [x, *layer.parameters()], torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    layer, x = PointwiseLinear(6, 4).to(dtype), torch.randn(2, 3, 5, 6, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_layouts_and_autocast():
    layer, x = PointwiseLinear(6, 4), torch.randn(2, 6, 3, 5).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(x[:, ::2]), layer(x[:, ::2].contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_exports_as_a_linear_layer():
    program = torch.export.export(PointwiseLinear(6, 4), (torch.randn(2, 3, 5, 6),))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators == {"aten.linear.default"}
