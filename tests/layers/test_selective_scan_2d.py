"""SS2D: against a scan written position by position, its orders, modulation, awkward shapes, dtypes, graphs, what it reports."""
import math

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.layers import SelectiveScan2d
from zoo.layers.selective_scan_2d import STEPS


def made(dim: int = 6, **options) -> SelectiveScan2d:
    torch.manual_seed(0)
    layer = SelectiveScan2d(dim, **{"state_dim": 3, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer


def naive(layer: SelectiveScan2d, x: Tensor, modulation: Tensor | None = None) -> Tensor:
    """The docstring, one position after the other, one picture after the other."""
    shift1, scale1, shift2, scale2, scale3 = (x.new_zeros(len(x), 1) if modulation is None else modulation[:, i, None] for i in range(5))
    n, out = layer.state_dim, []
    for picture, s1, c1, s2, c2, c3 in zip(x, shift1, scale1, shift2, scale2, scale3, strict=True):
        height, width, _ = picture.shape
        a, z = (layer.in_proj(picture * (1 + c1) + s1)).chunk(2, -1)
        u = F.silu(layer.conv2d(a.permute(2, 0, 1)[None])[0]).permute(1, 2, 0)
        rows = [(i, j) for i in range(height) for j in range(width)]
        columns = [(i, j) for j in range(width) for i in range(height)]
        total = torch.zeros_like(u)
        for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
            inner = u.shape[-1]
            rates, skip = -layer.A_logs[k * inner:(k + 1) * inner].exp(), layer.Ds[k * inner:(k + 1) * inner]
            state, placed = u.new_zeros(inner, n), {}
            for i, j in order:
                d, b, c = (layer.x_proj_weight[k] @ u[i, j]).split((layer.step_dim, n, n))
                step = F.softplus(layer.dt_projs_weight[k] @ d + layer.dt_projs_bias[k])[:, None]
                state = (step * rates).exp() * state + step * u[i, j, :, None] * b
                placed[i, j] = state @ c + skip * u[i, j]
            total = total + torch.stack([torch.stack([placed[i, j] for j in range(width)]) for i in range(height)])
        y = layer.out_norm(total * (1 + c3)) * (1 + c2) + s2
        out.append(layer.out_proj(y * F.silu(z)))
    return torch.stack(out)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("modulated", [False, True])
def test_as_position_by_position(size, modulated):
    layer, x = made(), torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
    modulation = torch.randn(2, 5, dtype=torch.float64, requires_grad=True) if modulated else None
    inputs = [value for value in (x, modulation) if value is not None]
    out, expected = layer(*inputs), naive(layer, *inputs)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    parts = [*inputs, *layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), parts) for y in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)


def test_one_modulation_for_all_pictures_and_none():
    layer, x = made(), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    numbers = torch.randn(1, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x, numbers), layer(x, numbers.expand(3, -1)))
    torch.testing.assert_close(layer(x, torch.zeros(3, 5, dtype=torch.float64)), layer(x))


def test_layouts_and_an_empty_batch():
    layer, x = made(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = layer(x)
    for given in (x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), x.transpose(1, 2).contiguous().transpose(1, 2),
                  x.repeat_interleave(2, -1)[..., ::2]):
        torch.testing.assert_close(layer(given), expected)
    assert layer(x[:0]).shape == (0, 4, 5, 6)
    torch.testing.assert_close(layer(x[1:]), expected[1:])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_dtypes(dtype, bound):
    layer, x = made(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    modulation = torch.randn(2, 5, dtype=torch.float64) / 4
    expected = layer(x, modulation).detach()
    out = layer.to(dtype)(x.to(dtype), modulation.to(dtype))
    assert out.dtype == dtype and (out.double() - expected).abs().max() <= bound * (1 + expected.abs().max())
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in layer.parameters())


def test_steps_are_reported_in_their_places():
    layer, x = made().eval(), torch.randn(1, 3, 4, 6, dtype=torch.float64)
    with torch.no_grad(), zoo.capture(layer) as maps:
        out = layer(x)
    steps = maps[""]["steps"]
    assert steps.shape == (1, 4, 12, 3, 4)
    a, z = layer.in_proj(x).chunk(2, -1)
    u = F.silu(layer.conv2d(a.permute(0, 3, 1, 2)))
    d = torch.einsum("kre,behw->bkrhw", layer.x_proj_weight[:, :layer.step_dim], u)
    expected = F.softplus(torch.einsum("ker,bkrhw->bkehw", layer.dt_projs_weight, d) + layer.dt_projs_bias[:, :, None, None])
    torch.testing.assert_close(steps, expected.float())
    with torch.no_grad():
        assert torch.equal(layer(x), out)


def test_first_values():
    torch.manual_seed(0)
    layer = SelectiveScan2d(40, 5)
    assert layer.step_dim == 3 and layer.dt_projs_weight.shape == (4, 80, 3)
    torch.testing.assert_close(-layer.A_logs.exp(), -torch.arange(1.0, 6).expand(320, 5))
    assert (layer.Ds == 1).all() and layer.dt_projs_weight.abs().max() <= 3**-0.5 and layer.x_proj_weight.abs().max() <= 80**-0.5
    logs = F.softplus(layer.dt_projs_bias.double()).log()
    assert math.log(STEPS[0]) - 1e-3 < logs.min() and logs.max() < math.log(STEPS[1]) + 1e-3
    assert abs(logs.mean() - sum(map(math.log, STEPS)) / 2) < 0.3 and abs(logs.std() - math.log(100) / 12**0.5) < 0.2


def test_compiled_whole_and_gradients():
    layer, x = made().float(), torch.randn(2, 4, 5, 6)
    modulation = torch.randn(2, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, modulation), layer(x, modulation))
    grads = [torch.autograd.grad(run(x, modulation).square().sum(), list(layer.parameters())) for run in (compiled, layer)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_exported_for_any_size(tmp_path):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = made().float()

        def forward(self, x, modulation):
            return self.layer(x, modulation)

    model = Part().eval().requires_grad_(False)
    free = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 5, 7, 6), torch.randn(2, 5)), dynamic_shapes=(
        {**free, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}, free), prefer_deferred_runtime_asserts_over_guards=True)
    torch.onnx.export(program, dynamo=True, opset_version=20, input_names=["x", "modulation"], verbose=False).save(tmp_path / "w.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "w.onnx")
    for size in ((1, 3, 4), (3, 11, 6)):
        x, modulation = torch.randn(*size, 6), torch.randn(size[0], 5)
        found, = session.run(None, {"x": x.numpy(), "modulation": modulation.numpy()})
        np.testing.assert_allclose(found, model(x, modulation).numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: SelectiveScan2d(0), "dim must be at least 1, got 0"),
    (lambda: SelectiveScan2d(8, 0), "state_dim must be at least 1, got 0"),
    (lambda: SelectiveScan2d(8, step_dim=0), "step_dim must be at least 1, got 0"),
    (lambda: SelectiveScan2d(8, kernel_size=4), "kernel_size must be odd, got 4"),
    (lambda: SelectiveScan2d(8)(torch.zeros(1, 8, 4, 4)), r"SelectiveScan2d: x must be \(B, H, W, 8\), got shape \(1, 8, 4, 4\)"),
    (lambda: SelectiveScan2d(8)(torch.zeros(1, 4, 4, 8), torch.zeros(1, 4)), r"modulation must be \(B, 5\), .* got shape \(1, 4\)"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
