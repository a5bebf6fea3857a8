import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from zoo.layers import DAS


def made(dim=32, seed=0, **args):
    """With offsets and norm that are not at rest."""
    torch.manual_seed(seed)
    layer = DAS(dim, **args)
    for parameter in (*layer.offset.parameters(), *layer.norm.parameters(), layer.bias):
        nn.init.normal_(parameter, std=0.3)
    return layer


def oracle(layer, x):
    """The formula with torchvision's operator, pixel by pixel where it is simple."""
    import torchvision

    pad = layer.padding
    hidden = nn.functional.conv2d(x, layer.depthwise.weight, padding=pad, groups=x.shape[1])
    hidden = torch.einsum("oc,bchw->bohw", layer.pointwise.weight[:, :, 0, 0], hidden)
    mean = hidden.mean((2, 3), keepdim=True)
    hidden = (hidden - mean) / ((hidden - mean).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    offsets = nn.functional.conv2d(hidden, layer.offset.weight, layer.offset.bias, padding=pad)
    out = torchvision.ops.deform_conv2d(hidden, offsets, layer.weight, layer.bias, padding=pad)
    mean = out.mean(1, keepdim=True)
    out = (out - mean) / ((out - mean).square().mean(1, keepdim=True) + layer.norm.eps).sqrt()
    out = out * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    return x / (1 + (-out).exp())


@pytest.mark.parametrize("args", [dict(), dict(group_width=None), dict(ratio=0.5, kernel_size=5), dict(dim=24), dict(dim=7)], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 3)], ids=str)
def test_is_the_formula(args, size):
    layer = made(**args).double()
    x = torch.randn(2, layer.dim, *size, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, expected)
    inputs, cotangent = [x, *layer.parameters()], torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))


def test_gradients_in_float64():
    layer = made(8).double()
    assert torch.autograd.gradcheck(layer, torch.randn(2, 8, 4, 5, dtype=torch.float64, requires_grad=True), fast_mode=True)


def test_new_layers_sample_where_an_ordinary_convolution_does():
    layer, x = DAS(32), torch.randn(2, 32, 7, 9)
    hidden = layer.act(nn.functional.instance_norm(layer.pointwise(layer.depthwise(x))))
    groups = layer.hidden_dim // layer.weight.shape[1]
    plain = nn.functional.conv2d(hidden, layer.weight, layer.bias, padding=1, groups=groups)
    torch.testing.assert_close(layer(x), x * layer.norm(plain).sigmoid())
    assert layer.gate(x).min() > 0 and layer.gate(x).max() < 1


def test_width_and_groups_follow_the_arguments():
    assert [DAS(dim).hidden_dim for dim in (16, 24, 64, 256, 2048)] == [3, 6, 12, 48, 384]
    assert DAS(256).weight.shape == (256, 3, 3, 3)
    assert DAS(256, group_width=None).weight.shape == (256, 51, 3, 3)


@pytest.mark.parametrize("training", [True, False])
def test_maps_of_one_position(training):
    layer, x = made().train(training), torch.randn(1, 32, 1, 1, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_and_channels_last(dtype):
    layer, x = made(), torch.randn(2, 32, 6, 10).to(memory_format=torch.channels_last)
    expected = layer(x)
    torch.testing.assert_close(layer(x.contiguous()), expected)
    assert (layer.to(dtype)(x.to(dtype)) - expected).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        out = made()(x)
    assert (out - expected).abs().max() < 0.1


def test_compiles_and_exports():
    layer = made().eval()
    x, free = torch.randn(2, 32, 9, 7), dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    proto = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=(free,), opset_version=20, verbose=False).model_proto
    assert "DeformConv" in {node.op_type for node in proto.graph.node}
    session, other = onnxruntime.InferenceSession(proto.SerializeToString()), torch.randn(1, 32, 12, 5)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0], layer(other), atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet26"])
def test_is_an_attn_layer_of_timm(name):
    model = timm.create_model(name, block_args=dict(attn_layer=DAS))
    assert any(isinstance(module, DAS) for module in model.modules())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("args", "message"), [
    (dict(dim=0), "dim must be at least 1, got 0"),
    (dict(ratio=0), "ratio must be positive, got 0"),
    (dict(kernel_size=4), "kernel_size must be odd, got 4"),
    (dict(group_width=0), "group_width must be at least 1, or None for one group, got 0"),
])
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        DAS(**dict(dim=32) | args)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"DAS: x must be \(B, 32, H, W\), got shape \(2, 16, 4, 4\)"):
        DAS(32)(torch.zeros(2, 16, 4, 4))
