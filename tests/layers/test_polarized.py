import pytest
import timm
import torch
from torch import nn

from zoo.layers import PolarizedSelfAttention

SIZES = [(6, 6), (7, 4), (1, 5), (1, 1)]
every_layout = pytest.mark.parametrize("layout", ["parallel", "sequential"])


def layer(layout, dim=16):
    torch.manual_seed(0)
    made = PolarizedSelfAttention(dim, layout).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def oracle(m, x):
    """The layer's formula in the paper's order, a loop over images and positions."""

    def conv(module, column):
        y = module.weight.flatten(1) @ column
        return y if module.bias is None else y + module.bias

    def up(column):
        if m.layout == "parallel":
            return conv(m.channel_up, column)
        y = conv(m.channel_up[0], column)
        norm = m.channel_up[1]
        y = (y - y.mean()) / (y.var(unbiased=False) + norm.eps).sqrt() * norm.weight.flatten() + norm.bias.flatten()
        return conv(m.channel_up[3], y.relu())

    def channel(columns):
        weights = torch.stack([conv(m.channel_query, x) for x in columns]).softmax(0)
        return torch.sigmoid(up(sum(weight * conv(m.channel_value, x) for weight, x in zip(weights, columns, strict=True))))

    def spatial(columns):
        query = sum(conv(m.spatial_query, x) for x in columns) / len(columns)
        values = torch.stack([conv(m.spatial_value, x) for x in columns])
        scores = (values @ query).softmax(0) if m.layout == "parallel" else values.softmax(0) @ query
        return torch.sigmoid(scores)

    images = []
    for image in x:
        columns = list(image.flatten(1).T)
        a = channel(columns)
        if m.layout == "parallel":
            out = [x * a + x * s for x, s in zip(columns, spatial(columns), strict=True)]
        else:
            columns = [x * a for x in columns]
            out = [x * s for x, s in zip(columns, spatial(columns), strict=True)]
        images.append(torch.stack(out, 1).unflatten(1, image.shape[1:]))
    return torch.stack(images)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dim", [16, 5, 2])
@every_layout
def test_layer_is_its_definition(layout, dim, size):
    m = layer(layout, dim)
    x = torch.randn(2, dim, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *m.parameters()]
    out, expected = m(x), oracle(m, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)))


@every_layout
def test_gradient_by_differences(layout):
    x = torch.randn(1, 16, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer(layout), x)


@every_layout
def test_gates_lie_between_zero_and_one(layout):
    m, x = layer(layout), 3 * torch.randn(4, 16, 9, 7, dtype=torch.float64)
    channel, spatial = m.channel_gate(x), m.spatial_gate(x)
    assert channel.shape == (4, 16, 1, 1) and spatial.shape == (4, 1, 9, 7)
    for gate in (channel, spatial):
        assert (gate > 0).all() and (gate < 1).all()
    if layout == "parallel":  # the logits of the spatial gate are a distribution over positions
        torch.testing.assert_close(spatial.logit().sum((1, 2, 3)), torch.ones(4, dtype=torch.float64))


@every_layout
def test_positions_may_change_places(layout):
    m, x = layer(layout), torch.randn(2, 16, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(m(x.flip(2, 3).transpose(2, 3)), m(x).flip(2, 3).transpose(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_layout
def test_dtypes_and_memory_layouts(layout, dtype):
    m, x = layer(layout), torch.randn(1, 16, 10, 7, dtype=torch.float64)
    expected = m(x)
    m, x = m.to(dtype), x.to(dtype)
    out = m(x)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    last = m(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    for same in (last, m(x.repeat_interleave(2, 3)[..., ::2])):
        torch.testing.assert_close(same, out, atol=tolerance, rtol=tolerance)


@every_layout
def test_autocast_keeps_the_type_of_the_map(layout):
    m = layer(layout).float()
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert m(torch.randn(2, 16, 5, 5, dtype=dtype)).dtype == dtype


@every_layout
def test_compiles_whole_and_exports_with_any_size(layout):
    m, x = layer(layout).float(), torch.randn(2, 16, 10, 7)
    torch.testing.assert_close(torch.compile(m, fullgraph=True)(x), m(x))
    shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    exported = torch.export.export(m, (x,), dynamic_shapes=shapes).module()
    for shape in ((2, 16, 9, 12), (3, 16, 5, 4)):
        y = torch.randn(shape)
        torch.testing.assert_close(exported(y), m(y))


@every_layout
def test_as_attention_of_timms_resnet(layout):
    def attention(dim, **args):
        return PolarizedSelfAttention(dim, layout, **args)

    model = timm.create_model("resnet18", num_classes=3, block_args=dict(attn_layer=attention))
    assert sum(isinstance(module, PolarizedSelfAttention) for module in model.modules()) == 8
    model(torch.randn(2, 3, 32, 48)).sum().backward()


def test_as_attention_by_class():
    model = timm.create_model("resnet50", block_args=dict(attn_layer=PolarizedSelfAttention))
    assert model.layer1[0].se.dim == 256


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="layout must be parallel or sequential, got 'series'"):
        PolarizedSelfAttention(8, "series")
    with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
        PolarizedSelfAttention(1)
