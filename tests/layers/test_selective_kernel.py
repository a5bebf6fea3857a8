import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SelectiveKernel
from torch import nn

from zoo.layers import SelectiveKernelUnit

OPTIONS = {
    "default": dict(),
    "true kernels": dict(kernel_sizes=(3, 5), dilated=False),
    "three branches": dict(kernel_sizes=(1, 3, 7)),
    "one branch": dict(kernel_sizes=(5,)),
    "dense and grouped": dict(kernel_sizes=(3, 3), groups=(1, 4)),
    "strided, wider": dict(out_dim=12, stride=2, groups=4),
    "dilated as a whole": dict(kernel_sizes=(3, 5), dilation=2),
    "narrow": dict(reduction=4, min_width=1),
}
SIZES = [(9, 9), (12, 5), (2, 3), (1, 1)]
every_option = pytest.mark.parametrize("name", OPTIONS)


def layer(dim=8, **options):
    torch.manual_seed(0)
    made = SelectiveKernelUnit(dim, **options).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made.eval()


def norm(y, m, channel):
    return (y - m.running_mean[channel]) / (m.running_var[channel] + m.eps).sqrt() * m.weight[channel] + m.bias[channel]


def oracle(m, x, options):
    """The unit's formula, a loop over branches, images, channels, positions and taps."""
    kernels, stride, whole = options.get("kernel_sizes", (3, 5)), options.get("stride", 1), options.get("dilation", 1)
    height, width = (-(-n // stride) for n in x.shape[2:])
    maps = []
    for kernel, conv, bn in zip(kernels, m.convs, m.norms, strict=True):
        step = whole * (kernel // 2 if options.get("dilated", True) and kernel > 3 else 1)
        taps = 3 if options.get("dilated", True) and kernel > 3 else kernel
        reach = step * (taps // 2)
        padded = F.pad(x, (reach,) * 4)
        outputs, inputs = conv.weight.shape[:2]
        group = outputs // (x.shape[1] // inputs)
        channels = []
        for o in range(outputs):
            first = o // group * inputs
            y = 0
            for i in range(taps):
                for j in range(taps):
                    rows, columns = (slice(a * step, a * step + stride * (n - 1) + 1, stride) for a, n in ((i, height), (j, width)))
                    y = y + (padded[:, first : first + inputs, rows, columns] * conv.weight[o, :, i, j, None, None]).sum(1)
            channels.append(norm(y, bn, o).relu())
        maps.append(torch.stack(channels, 1))
    pooled = sum(maps).mean((2, 3))
    z = (pooled @ m.reduce.weight.flatten(1).T - m.norm.running_mean) / (m.norm.running_var + m.norm.eps).sqrt()
    z = (z * m.norm.weight + m.norm.bias).relu()
    out = torch.zeros_like(maps[0])
    for c in range(out.shape[1]):
        rows = [m.select.weight[branch * out.shape[1] + c].flatten() for branch in range(len(maps))]
        weights = torch.stack([z @ row for row in rows]).softmax(0)
        out[:, c] = sum(weight[:, None, None] * y[:, c] for weight, y in zip(weights, maps, strict=True))
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
@every_option
def test_layer_is_its_definition(name, size):
    m = layer(**OPTIONS[name])
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *m.parameters()]
    out, expected = m(x), oracle(m, x, OPTIONS[name])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)))


def test_gradient_by_differences():
    m, x = layer(dim=4, groups=2, min_width=4), torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, x)


@every_option
def test_weights_sum_to_one_over_branches(name):
    m = layer(**OPTIONS[name])
    maps = m.branches(torch.randn(3, 8, 7, 5, dtype=torch.float64))
    weights = m.weights(maps)
    assert weights.shape == (3, len(maps), maps[0].shape[1], 1, 1) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))


def test_dilation_reaches_as_far_as_the_kernel_it_stands_for():
    for dilated, taps in ((True, 9), (False, 25)):
        conv = layer(kernel_sizes=(5,), dilated=dilated).convs[0]
        assert conv.weight[0, 0].numel() == taps
        touched = torch.autograd.functional.jacobian(lambda x, conv=conv: conv(x)[0, :, 4, 4].sum(), torch.randn(1, 8, 9, 9).double())
        reached = touched[0].abs().sum(0).nonzero()
        assert reached.min() == 2 and reached.max() == 6


@pytest.mark.parametrize("keep_3x3", [True, False])
def test_is_timms_where_that_does_not_split_its_input(keep_3x3):
    unit = layer(dim=64, dilated=keep_3x3, groups=32, stride=2)
    theirs = SelectiveKernel(64, 64, kernel_size=[3, 5], stride=2, groups=32, keep_3x3=keep_3x3, split_input=False, rd_channels=32)
    for (conv, norm_), path in zip(zip(unit.convs, unit.norms, strict=True), theirs.paths, strict=True):
        path.conv, path.bn.weight, path.bn.bias = conv, norm_.weight, norm_.bias
        path.bn.running_mean, path.bn.running_var = norm_.running_mean, norm_.running_var
    theirs.attn.fc_reduce, theirs.attn.bn, theirs.attn.fc_select = unit.reduce, unit.norm, unit.select
    x = torch.randn(2, 64, 7, 10, dtype=torch.float64)
    torch.testing.assert_close(unit(x), theirs.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_memory_layouts(dtype):
    m, x = layer(), torch.randn(1, 8, 10, 7, dtype=torch.float64)
    expected = m(x)
    m, x = m.to(dtype), x.to(dtype)
    out = m(x)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    layouts = (x.to(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2])
    for same in layouts:
        torch.testing.assert_close(m(same), out, atol=tolerance, rtol=tolerance)


def test_compiles_whole_and_exports_with_any_size():
    m, x = layer(kernel_sizes=(3, 5, 7)).float(), torch.randn(2, 8, 10, 7)
    torch.testing.assert_close(torch.compile(m, fullgraph=True)(x), m(x))
    shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    exported = torch.export.export(m, (x,), dynamic_shapes=shapes).module()
    for shape in ((2, 8, 9, 12), (3, 8, 5, 4)):
        y = torch.randn(shape)
        torch.testing.assert_close(exported(y), m(y))


def test_as_attention_of_timms_resnet():
    model = timm.create_model("resnet18", num_classes=3, block_args=dict(attn_layer=SelectiveKernelUnit))
    assert sum(isinstance(module, SelectiveKernelUnit) for module in model.modules()) == 8
    model(torch.randn(2, 3, 32, 48)).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kernel_sizes=(3, 4)), r"kernel_sizes must be odd numbers, at least one, got \(3, 4\)"),
        (dict(kernel_sizes=()), "at least one"),
        (dict(groups=3), r"groups must divide dim \(8\) and out_dim \(8\), got \(3, 3\)"),
        (dict(groups=(1, 2, 4)), r"one for each of 2 branches, got \(1, 2, 4\)"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SelectiveKernelUnit(8, **options)
