import pytest
import torch
import torchvision
from torch import nn

from zoo.layers import DeformableTokenMerging


def made(dim=6, out_dim=None) -> DeformableTokenMerging:
    """With offsets and norm that are not at rest."""
    torch.manual_seed(0)
    layer = DeformableTokenMerging(dim, out_dim)
    for parameter in (*layer.offset.parameters(), *layer.norm.parameters(), layer.bias):
        nn.init.normal_(parameter, std=0.5)
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    return layer.eval()


def oracle(m, x):
    """The formula around torchvision's operator."""
    x = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    out = torchvision.ops.deform_conv2d(x, nn.functional.conv2d(x, m.offset.weight, m.offset.bias, 2), m.weight, m.bias, 2)
    mean, var = (out.mean((0, 2, 3)), out.var((0, 2, 3), correction=0)) if m.training else (m.norm.running_mean, m.norm.running_var)
    out = (out - mean[:, None, None]) / (var[:, None, None] + m.norm.eps).sqrt()
    out = out * m.norm.weight[:, None, None] + m.norm.bias[:, None, None]
    return out * 0.5 * (1 + torch.erf(out / 2**0.5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [6, 64])  # narrow, and wide enough to be gathered
@pytest.mark.parametrize("size", [(8, 6), (5, 9), (2, 1)], ids=str)
def test_is_the_formula(dim, size, training):
    m = made(dim, 10).double().train(training)
    x = torch.randn(3, dim, *size, dtype=torch.float64, requires_grad=True)
    out, expected = m(x), oracle(m, x)
    assert out.shape == (3, 10, -(-size[0] // 2), -(-size[1] // 2))
    torch.testing.assert_close(out, expected)
    inputs, cotangent = [x, *m.parameters()], torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent))


def test_new_layers_merge_as_an_ordinary_convolution():
    m, x = DeformableTokenMerging(6), torch.randn(2, 6, 8, 10)
    expected = nn.functional.gelu(m.norm(nn.functional.conv2d(x, m.weight, m.bias, 2)))
    torch.testing.assert_close(m(x), expected)
    assert expected.shape[1] == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_and_memory_layouts(dtype):
    m, x = made(64), torch.randn(2, 64, 6, 10)
    expected = m(x)
    found = m(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(m(x.repeat_interleave(2, 3)[..., ::2]), expected)
    assert (m.to(dtype)(x.to(dtype)) - expected).abs().max() < 0.1


def test_compiles_whole_and_survives_saving(tmp_path):
    m, x = made(), torch.randn(2, 6, 5, 8)
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(x), m(x))
    torch.save(m.state_dict(), tmp_path / "layer.pth")
    other = DeformableTokenMerging(6).eval()
    other.load_state_dict(torch.load(tmp_path / "layer.pth", weights_only=True))
    assert torch.equal(other(x), m(x))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="dim and out_dim must be at least 1, got 6 and 0"):
        DeformableTokenMerging(6, 0)
    with pytest.raises(ValueError, match=r"DeformableTokenMerging: x must be \(B, 6, H, W\), got shape \(2, 5, 4, 4\)"):
        made()(torch.zeros(2, 5, 4, 4))
