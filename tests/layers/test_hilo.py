import math

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from zoo.layers import HiLoAttention

OPTIONS = {
    "default": dict(),
    "mostly low": dict(alpha=0.9),
    "high only": dict(alpha=0.0),
    "low only": dict(alpha=1.0),
    "ordinary": dict(window=1),
    "large windows": dict(window=3, qkv_bias=False),
    "unmasked": dict(mask_padding=False),
    "unmasked, large windows": dict(window=3, mask_padding=False),
}
SIZES = [(6, 6), (5, 7), (1, 3), (1, 1)]


def made(**options) -> HiLoAttention:
    torch.manual_seed(0)
    layer = HiLoAttention(12, 4, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def image(*size, batch=2):
    return torch.randn(batch, *size, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def attend(q, keys, values):
    """One query (d,) and its keys and values (n, d)."""
    scores = torch.stack([(q * key).sum() / math.sqrt(len(q)) for key in keys])
    weights = scores.exp() / scores.exp().sum()
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def oracle(m, x):
    """The formula, a loop over images, heads and positions."""
    (b, height, width, _), s, d = x.shape, m.window, 3
    rows, columns = math.ceil(height / s) * s, math.ceil(width / s) * s
    at = {(i, j): x[:, i, j] if i < height and j < width else torch.zeros_like(x[:, 0, 0]) for i in range(rows) for j in range(columns)}
    taken = {place: value for place, value in at.items() if not m.mask_padding or place[0] < height and place[1] < width}
    windows = {}
    for i, j in taken:
        windows.setdefault((i // s, j // s), []).append((i, j))
    out = torch.zeros_like(x)
    for n in range(b):
        means = [torch.stack([taken[place][n] for place in places]).mean(0) for places in windows.values()]
        for i in range(height):
            for j in range(width):
                hi, lo = [], []
                for head in range(m.hi_heads):
                    q, k, v = (slice((part * m.hi_heads + head) * d, (part * m.hi_heads + head + 1) * d) for part in range(3))
                    near = [m.hi_qkv(taken[place][n]) for place in windows[i // s, j // s]]
                    hi.append(attend(m.hi_qkv(x[n, i, j])[q], [t[k] for t in near], [t[v] for t in near]))
                for head in range(m.lo_heads):
                    k, v = (slice((part * m.lo_heads + head) * d, (part * m.lo_heads + head + 1) * d) for part in range(2))
                    far = [m.lo_kv(mean) for mean in means]
                    lo.append(attend(m.lo_q(x[n, i, j])[k], [t[k] for t in far], [t[v] for t in far]))
                out[n, i, j] = torch.cat(([m.hi_proj(torch.cat(hi))] if hi else []) + ([m.lo_proj(torch.cat(lo))] if lo else []))
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_layer_is_its_definition(name, size):
    m, x = made(**OPTIONS[name]), image(*size)
    out, expected = m(x), oracle(m, x.detach().clone().requires_grad_())
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_the_definition(name):
    m, x = made(**OPTIONS[name]), image(3, 5, batch=1)
    inputs = [x, *m.parameters()]
    grads = (torch.autograd.grad(f(x).square().sum(), inputs) for f in (m, lambda x: oracle(m, x)))
    torch.testing.assert_close(*grads)
    assert torch.autograd.gradcheck(m, x, fast_mode=True)


def test_heads_are_shared_out_as_the_authors_do():
    assert [HiLoAttention(48, 12, alpha=a).lo_heads for a in (0, 0.04, 0.5, 0.9, 0.99, 1)] == [0, 0, 6, 10, 11, 12]
    assert HiLoAttention(48, 12, window=1, alpha=0.3).lo_heads == 12
    assert not hasattr(HiLoAttention(48, 12, alpha=1), "hi_qkv") and not hasattr(HiLoAttention(48, 12, alpha=0), "lo_q")


def test_windows_of_one_position_are_ordinary_attention():
    m, x = made(window=1, alpha=1.0), image(5, 4)
    ordinary = nn.MultiheadAttention(12, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        ordinary.in_proj_weight.copy_(torch.cat((m.lo_q.weight, m.lo_kv.weight)))
        ordinary.in_proj_bias.copy_(torch.cat((m.lo_q.bias, m.lo_kv.bias)))
    ordinary.out_proj.load_state_dict(m.lo_proj.state_dict())
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(m(x).flatten(1, 2), ordinary(tokens, tokens, tokens)[0])


def test_high_heads_see_their_window_and_low_heads_the_means():
    m, x = made(), image(6, 8, batch=1).detach()
    half, moved = 6, x.clone()
    moved[0, 0, 0] += 1
    moved[0, 1, 1] -= 1  # in the same window, whose mean stays
    changed = (m(moved) - m(x)).abs() > 1e-9
    assert changed[0, :2, :2, :half].all() and not changed[0, 2:, :, :half].any() and not changed[0, :, 2:, :half].any()
    assert not changed[0, 2:, :, half:].any() and changed[0, 0, 0, half:].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    m, x = made(), image(5, 7).detach()
    expected = m(x)
    out = m.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_memory_layouts_and_saved_state(tmp_path):
    m, x = made().float(), image(5, 7).detach().float()
    expected = m(x)
    torch.testing.assert_close(m(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), expected)
    torch.testing.assert_close(m(x.repeat_interleave(2, 0)[::2]), expected)
    torch.save(m.state_dict(), tmp_path / "layer.pth")
    other = HiLoAttention(12, 4)
    other.load_state_dict(torch.load(tmp_path / "layer.pth", weights_only=True))
    assert torch.equal(other(x), expected)


def test_compiles_whole():
    m, x = made().float(), image(5, 7).detach().float()
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(x), m(x))


@pytest.mark.parametrize("name", ["large windows", "unmasked"])
def test_exports_with_any_size(name):
    m, free = made(**OPTIONS[name]).float().eval(), dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    example = (torch.randn(2, 12, 18, 12),)
    program = torch.export.export(m, example, dynamic_shapes=(free,), prefer_deferred_runtime_asserts_over_guards=True)
    proto = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).model_proto
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for shape in ((1, 12, 12, 12), (3, 5, 8, 12), (2, 7, 4, 12)):
        x = torch.randn(shape)
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], m(x), atol=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    (dict(num_heads=5), r"num_heads must divide dim \(12\), got 5"),
    (dict(num_heads=0), "num_heads must divide"),
    (dict(window=0), "window must be at least 1, got 0"),
    (dict(alpha=1.5), "alpha must be 0 to 1, got 1.5"),
])
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HiLoAttention(12, **dict(num_heads=4) | options)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"HiLoAttention: x must be \(B, H, W, 12\), got shape \(2, 12, 5, 5\)"):
        made()(torch.zeros(2, 12, 5, 5))
