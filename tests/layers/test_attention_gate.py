import io
import itertools

import pytest
import torch
from torch import nn

from zoo.layers import AttentionGate, MultiAttentionGate, capture

SIZES = {2: [(4, 3), (1, 2), (1, 1)], 3: [(2, 3, 2), (1, 1, 1)]}
CASES = [(dims, size) for dims, sizes in SIZES.items() for size in sizes]
every_dims = pytest.mark.parametrize("dims", [2, 3])


def gate(dims, normalization="sigmoid", norm="batch", **args):
    torch.manual_seed(0)
    made = AttentionGate(8, 5, 3, dims, normalization, norm, **args).double().eval()
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.2 if tensor.ndim == 1 else torch.randn_like(tensor))
    return made


def maps(size, batch=2, dtype=torch.float64):
    half = [(n + 1) // 2 for n in size]
    return torch.randn(batch, 8, *size, dtype=dtype, requires_grad=True), torch.randn(batch, 5, *half, dtype=dtype, requires_grad=True)


def positions(size):
    return itertools.product(*map(range, size))


def interpolated(values, size):
    """{position: number} on a grid → on a grid of `size`, linear between the centres."""
    old = [1 + max(axis) for axis in zip(*values, strict=True)]

    def shares(i, n, m):
        at = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
        low = int(at)
        return [(low, 1 - (at - low)), (min(low + 1, n - 1), at - low)]

    out = {}
    for place in positions(size):
        corners = itertools.product(*(shares(i, n, m) for i, n, m in zip(place, old, size, strict=True)))
        out[place] = sum(values[tuple(i for i, _ in corner)] * torch.tensor([w for _, w in corner]).prod() for corner in corners)
    return out


def oracle(m, x, g):
    """The formula, a loop over images and positions; θ sees the last slice twice where a size is odd."""
    images = []
    for image, signal in zip(x, g, strict=True):
        size, half = image.shape[1:], [(n + 1) // 2 for n in image.shape[1:]]
        even = [2 * n for n in half]
        scores = {}
        for place in positions(half):
            hidden = m.phi.weight.flatten(1) @ signal[(slice(None), *place)] + m.phi.bias
            for tap in positions([2] * len(half)):
                at = [min(2 * p + t, n - 1) for p, t, n in zip(place, tap, size, strict=True)]
                hidden = hidden + m.theta.weight[(slice(None), slice(None), *tap)] @ image[(slice(None), *at)]
            scores[place] = m.psi.weight.flatten() @ hidden.relu() + m.psi.bias[0]
        if m.normalization == "sigmoid":
            weights = {place: score.sigmoid() for place, score in scores.items()}
        else:
            total = sum(score.exp() for score in scores.values())
            weights = {place: score.exp() / total for place, score in scores.items()}
        weights = interpolated(weights, even)
        out = torch.stack([
            m.proj.weight.flatten(1) @ (weights[place] * image[(slice(None), *place)]) + m.proj.bias for place in positions(size)], 1)
        out = (out - m.norm.running_mean[:, None]) / (m.norm.running_var[:, None] + m.norm.eps).sqrt()
        images.append((out * m.norm.weight[:, None] + m.norm.bias[:, None]).unflatten(1, size))
    return torch.stack(images)


@pytest.mark.parametrize("normalization", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("dims", "size"), CASES, ids=str)
def test_gate_is_its_definition(dims, size, normalization):
    m, (x, g) = gate(dims, normalization), maps(size, batch=1 + (dims == 2))
    out, expected = m(x, g), oracle(m, x, g)
    torch.testing.assert_close(out, expected)
    inputs = [x, g, *m.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)))


@every_dims
@pytest.mark.parametrize("normalization", ["sigmoid", "softmax"])
def test_gradient_by_differences(dims, normalization):
    assert torch.autograd.gradcheck(gate(dims, normalization), maps((4, 3, 2)[:dims], batch=1))


@every_dims
def test_several_gates_are_combined(dims):
    torch.manual_seed(0)
    m = MultiAttentionGate(8, 5, spatial_dims=dims, num_gates=3).double().eval()
    x, g = maps((6, 4, 2)[:dims])
    together = torch.cat([one(x, g) for one in m.gates], 1)
    expected = m.norm(torch.einsum("oi,bi...->bo...", m.combine.weight.flatten(1), together)
                      + m.combine.bias.view(-1, *[1] * dims)).clamp(min=0)
    torch.testing.assert_close(m(x, g), expected)
    with capture(m) as seen:
        m(x, g)
    assert set(seen) == {f"gates.{i}" for i in range(3)}


def test_gating_signals_of_other_sizes_are_interpolated():
    m, (x, _) = gate(2), maps((8, 6))
    g = torch.full((2, 5, 1, 1), 0.7, dtype=torch.float64)
    torch.testing.assert_close(m(x, g), m(x, g.expand(2, 5, 4, 3)))
    assert m(x, torch.randn(2, 5, 9, 1, dtype=torch.float64)).shape == x.shape


@every_dims
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_norms_train_and_take_single_positions(dims, norm):
    m = gate(dims, norm=norm).train()
    for size in ((4, 5, 3)[:dims], (1, 1, 1)[:dims]):
        m(*maps(size)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


@every_dims
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_memory_layouts(dims, dtype):
    m, (x, g) = gate(dims), maps((6, 5, 4)[:dims])
    expected = m(x, g)
    m, x, g = m.to(dtype), x.to(dtype), g.to(dtype)
    out, tolerance = m(x, g), 1e-4 if dtype == torch.float32 else 0.2
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    last = m(x.contiguous(memory_format=layout), g)
    assert last.is_contiguous(memory_format=layout) or dims == 3  # torch's convolutions of volumes do as they like
    for same in (last, m(x.repeat_interleave(2, -1)[..., ::2], g)):
        torch.testing.assert_close(same, out, atol=tolerance, rtol=tolerance)


@every_dims
def test_compiles_whole_exports_with_any_size_and_survives_saving(dims):
    m = gate(dims).float()
    x, g = (t.detach() for t in maps((6, 8, 4)[:dims], dtype=torch.float32))
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(x, g), m(x, g))
    sizes = dict.fromkeys((0, *range(2, 2 + dims)), torch.export.Dim.DYNAMIC)
    program = torch.export.export(m, (x, g), dynamic_shapes=(sizes, sizes))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in ((5, 7, 9)[:dims], (12, 4, 6)[:dims]):
        other = [t.detach() for t in maps(size, batch=3, dtype=torch.float32)]
        torch.testing.assert_close(loaded(*other), m(*other))


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(spatial_dims=4), "spatial_dims must be 2 or 3, got 4"),
    (dict(norm="layer"), "norm must be one of batch, instance, group, got 'layer'"),
    (dict(normalization="relu"), "normalization must be sigmoid or softmax, got 'relu'"),
    (dict(hidden_dim=0), "hidden_dim must be at least 1, got 0"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionGate(8, 4, **arguments)


def test_bad_maps_are_named():
    with pytest.raises(ValueError, match="num_gates must be at least 1, got 0"):
        MultiAttentionGate(8, 4, num_gates=0)
    with pytest.raises(ValueError, match=r"x must be \(B, 8, H, W\), got shape \(1, 7, 4, 4\)"):
        AttentionGate(8, 4)(torch.zeros(1, 7, 4, 4), torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"g must be \(B, 4, D, H, W\), got shape \(1, 4, 2, 2\)"):
        AttentionGate(8, 4, spatial_dims=3)(torch.zeros(1, 8, 4, 4, 4), torch.zeros(1, 4, 2, 2))


class Reporting(nn.Module):
    def forward(self, x):
        from zoo.layers._capture import report

        self.asked = 0

        def costly():
            self.asked += 1
            return x + 1

        report(self, plain=x, costly=costly)
        return x


def test_capture_collects_by_module_and_costs_nothing_when_off():
    model = nn.Sequential(Reporting(), nn.ReLU(), Reporting())
    model(torch.zeros(2))
    assert model[0].asked == 0
    with capture(model) as outer:
        model(torch.zeros(2))
        with capture(model) as inner:
            model(torch.ones(2))
    assert set(outer) == set(inner) == {"0", "2"}
    assert outer["2"]["costly"].tolist() == [1, 1] and inner["0"]["costly"].tolist() == [2, 2]
    assert inner["0"]["plain"].tolist() == [1, 1]
    assert not any("takes" in key for module in model.modules() for key in vars(module))
    model(torch.zeros(2))
    assert model[2].asked == 0


def test_capture_ends_with_an_error_and_keeps_graphs():
    m, (x, g) = gate(2), maps((4, 4))
    with pytest.raises(RuntimeError, match="inside"), capture(m):
        raise RuntimeError("inside")
    with capture(m) as seen:
        m(x, g)
    assert seen[""]["attention"].shape == (2, 1, 4, 4)
    assert torch.autograd.grad(seen[""]["attention"].sum(), g)[0].abs().sum() > 0
    m(x, g)
    assert list(seen) == [""]
