"""What is particular to LITv2: where its offsets begin, sizes that nothing divides, and its export."""
import pytest
import timm
import torch
from torch import nn

from zoo.checkpoints import load_model
from zoo.exporting.onnx import export_onnx
from zoo.layers import DeformableTokenMerging, HiLoAttention
from zoo.models.litv2 import ConvMlp


def test_sizes_are_rounded_up_and_nothing_of_an_image_is_lost():
    torch.manual_seed(0)
    model, x = timm.create_model("litv2_nano", features_only=True).eval(), torch.randn(1, 3, 37, 66, requires_grad=True)
    features = model(x)
    assert [tuple(f.shape[2:]) for f in features] == [(10, 17), (5, 9), (3, 5), (2, 3)]
    features[-1][:, :, -1, -1].sum().backward()
    assert (x.grad[0, :, -1, -1] != 0).all()


def test_arguments_reach_the_attention():
    model = timm.create_model("litv2_nano", alpha=0.5, windows=(None, 4, 2, 1), attn_args=dict(mask_padding=False))
    found = [(m.window, m.lo_heads, m.mask_padding) for m in model.modules() if isinstance(m, HiLoAttention)]
    assert found == [(4, 1, False)] + 3 * [(2, 3, False)] + [(1, 8, False)]


def test_offsets_begin_at_zero():
    layers = [m for m in timm.create_model("litv2_nano").modules() if isinstance(m, DeformableTokenMerging)]
    assert len(layers) == 3 and not any(p.any() for layer in layers for p in layer.offset.parameters())


def test_mlp_is_the_same_with_and_without_gradients():
    mlp, x = ConvMlp(6, 20), torch.randn(2, 5, 7, 6)
    maps = mlp.fc1(x).permute(0, 3, 1, 2)
    expected = mlp.fc2(nn.functional.gelu(mlp.dwconv(maps)).permute(0, 2, 3, 1))
    torch.testing.assert_close(mlp(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("large, parts", [(1 << 20, 1), (0, 3)])
def test_large_hidden_maps_are_made_an_image_at_a_time(large, parts):
    mlp, x, made = ConvMlp(24, 96), torch.randn(3, 5, 7, 24), []
    expected = mlp(x)
    convolved, mlp.LARGE = mlp._convolved, large
    mlp._convolved = lambda part: made.append(len(part)) or convolved(part)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected.detach())
    assert made == [3 // parts] * parts


def test_exports_with_free_batch_and_sizes(tmp_path):
    model, info = load_model("litv2_nano", in_chans=1, num_classes=10, depths=(1, 1, 1, 1))
    result = export_onnx(model, info, tmp_path / "x.onnx", size=(32, 32))
    assert result.free_batch and result.free_size, result.reason
