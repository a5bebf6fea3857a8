import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from zoo.layers import TokenAwareAvgPool


def made(dim=6, seed=0, **args):
    torch.manual_seed(seed)
    layer = TokenAwareAvgPool(dim, **args).eval()
    for x in (*layer.norm.parameters(), layer.norm.running_mean):
        torch.nn.init.normal_(x)
    return layer


def oracle(layer, x):
    """The formula, with one unfolded map per scale."""
    x = x.permute(0, 3, 1, 2)
    norm = layer.norm
    hidden = F.conv2d(x, layer.conv1.weight, padding=1)
    shape = (-1, 1, 1)
    hidden = (hidden - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    scores = F.conv2d(hidden * norm.weight.view(shape) + norm.bias.view(shape), layer.conv2.weight, padding=1)
    weights = scores.exp() / scores.exp().sum(1, keepdim=True)
    pools = [x] + [F.unfold(x, 3, dilation=k, padding=k).unflatten(1, (-1, 9)).mean(2).unflatten(2, x.shape[2:])
                   for k in range(1, layer.num_scales)]
    return sum(weights[:, k, None] * pool for k, pool in enumerate(pools)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("args", [dict(), dict(num_scales=2), dict(dim=3, num_scales=6)], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (5, 9), (1, 1)], ids=str)
def test_is_the_formula(args, size):
    layer = made(**args).double()
    x = torch.randn(2, *size, layer.dim, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, expected)
    inputs, cotangent = [x, *layer.parameters()], torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))


def test_gradients_in_float64():
    assert torch.autograd.gradcheck(made().double(), torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True), fast_mode=True)


def test_one_scale_is_the_identity():
    x = torch.randn(2, 5, 4, 6)
    assert torch.equal(made(num_scales=1)(x), x)


def test_weights_sum_to_one():
    weights = made().weights(torch.randn(2, 5, 4, 6))
    assert weights.shape == (2, 5, 4, 4) and weights.min() > 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision(dtype):
    layer, x = made(), torch.randn(2, 6, 5, 6)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x) - expected).abs().max() < 0.1
    assert (layer.to(dtype)(x.to(dtype)) - expected).abs().max() < 0.1


def test_compiles_and_exports():
    layer, x = made(), torch.randn(2, 6, 5, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    free = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    proto = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=(free,), verbose=False).model_proto
    session, other = onnxruntime.InferenceSession(proto.SerializeToString()), torch.randn(1, 9, 4, 6)
    found = session.run(None, {session.get_inputs()[0].name: other.numpy()})[0]
    np.testing.assert_allclose(found, layer(other).detach().numpy(), atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_scales must be at least 1, got 4 and 0"):
        TokenAwareAvgPool(4, 0)
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 6\), got shape \(2, 6, 5, 5\)"):
        made()(torch.randn(2, 6, 5, 5))
