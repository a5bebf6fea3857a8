import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F

from zoo.layers import ATConv

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "positions first": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
}
SIZES = [(7, 7), (5, 8), (1, 1), (2, 1), (3, 3)]


def make(kernel_size=3, dim=6, dtype=torch.float64, **args):
    torch.manual_seed(0)
    layer = ATConv(dim, kernel_size, **args).to(dtype)
    with torch.no_grad():
        layer.difference_control.normal_()
    return layer


def draw(size, batch=2, dim=6, dtype=torch.float64):
    return torch.randn(batch, dim, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def oracle(layer, x):
    """The definition, sample by sample and channel by channel: project, pool runs of positions, make the kernel, convolve."""
    out = []
    for image in x:
        context, values = (torch.einsum("oc,chw->ohw", p.weight[..., 0, 0], image) + (0 if p.bias is None else p.bias[:, None, None])
                           for p in (layer.kernel_proj, layer.x_proj))
        channels = []
        for row, value, theta in zip(context.flatten(1), values, layer.difference_control, strict=True):
            count, length = layer.kernel_size**2, len(row)
            pooled = torch.stack([row[i * length // count : -(-(i + 1) * length // count)].mean() for i in range(count)])
            kernel = layer.kernel_gen(F.gelu(pooled))
            kernel = (kernel - torch.sigmoid(theta) * kernel.mean()).reshape(layer.kernel_size, layer.kernel_size)
            half = layer.kernel_size // 2
            padded = F.pad(value, (half,) * 4)
            channels.append(torch.stack([torch.stack([(padded[i:i + len(kernel), j:j + len(kernel)] * kernel).sum()
                                                      for j in range(value.shape[1])]) for i in range(value.shape[0])]))
        projected = torch.einsum("oc,chw->ohw", layer.proj.weight[..., 0, 0], torch.stack(channels))
        out.append(projected + (0 if layer.proj.bias is None else layer.proj.bias[:, None, None]))
    return torch.stack(out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("args", [dict(), dict(kernel_size=5, bias=False), dict(kernel_size=1)], ids=str)
def test_is_the_definition_with_gradients_in_every_layout(size, layout, args):
    layer, x = make(**args), draw(size).requires_grad_()
    inputs = [x, *layer.parameters()]
    expected, out = oracle(layer, x), layer(LAYOUTS[layout](x))
    cotangent = draw(size)
    ours, theirs = (torch.autograd.grad(y, inputs, cotangent) for y in (out, expected))
    torch.testing.assert_close((out, *ours), (expected, *theirs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_float64(layout):
    layer, x = make(dim=3), draw((4, 5), dim=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(LAYOUTS[layout](x)), x)
    assert torch.autograd.gradgradcheck(lambda x: layer(LAYOUTS[layout](x)), x, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_the_layout(layout):
    x = LAYOUTS[layout](draw((4, 5)))
    assert make()(x).stride() == x.stride()


def test_full_inhibition_leaves_nothing_of_a_constant_map():
    """θ → ∞: every kernel sums to zero, so that inside the map only the projection's bias is left."""
    layer = make()
    torch.nn.init.constant_(layer.difference_control, torch.inf)
    out = layer(draw((1, 1)).expand(-1, -1, 6, 7))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(out, layer.proj.bias[:, None, None].expand_as(out))


def test_kernels_follow_the_content_of_their_own_sample():
    layer, x = make(), draw((6, 6), batch=3)
    kernels = layer.kernels(x)
    assert kernels.shape == (3, 6, 3, 3) and (kernels[0] - kernels[1]).abs().max() > 1e-3
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(dtype):
    layer, x = make(dim=32, dtype=dtype), draw((14, 10), dim=32, dtype=dtype)
    with torch.no_grad():
        out, expected = layer(x), layer.double()(x.double())
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=0)


def test_autocast_and_float32_agree():
    layer, x = make(dtype=torch.float32), draw((9, 9), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(out.float(), layer(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole(layout):
    layer, x = make(dtype=torch.float32), LAYOUTS[layout](draw((6, 5), dtype=torch.float32)).requires_grad_()
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, layer(x))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(layer(x).sum(), x))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_onnx_runs_at_other_sizes(kernel_size, tmp_path):
    layer = make(kernel_size, dtype=torch.float32).eval()
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(layer, (draw((16, 16), dtype=torch.float32),), dynamic_shapes=(free,))
    torch.onnx.export(program, dynamo=True, verbose=False, input_names=["x"]).save(tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for batch, size in ((1, (16, 16)), (4, (9, 31)), (3, (2, 1))):
        x = draw(size, batch, dtype=torch.float32)
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], layer(x).numpy(), atol=1e-5)


def test_is_an_attn_layer_of_timm():
    model = timm.create_model("resnet18", num_classes=5, block_args=dict(attn_layer=ATConv))
    assert sum(isinstance(m, ATConv) for m in model.modules()) == 8
    out = model(torch.randn(2, 3, 64, 48))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_input_is_named():
    for size in (0, 2, -1):
        with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {size}"):
            ATConv(4, size)
    with pytest.raises(ValueError, match=r"x must be \(B, 6, H, W\), got shape \(2, 4, 5, 5\)"):
        make()(torch.zeros(2, 4, 5, 5))
