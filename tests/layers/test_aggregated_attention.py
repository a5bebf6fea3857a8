import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.layers import AggregatedAttention, LengthScaledAttention, MixtureOfHeads

SIZES = [(4, 6), (5, 7), (1, 3), (1, 1), (9, 2)]  # ratios that divide, that do not, and that are larger than the map


def made(kind, **args) -> nn.Module:
    torch.manual_seed(0)
    layer = kind(12, 3, pretrain_size=(5, 4), **args).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def image(*size, batch=2):
    return torch.randn(batch, *size, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def bias(layer, distances, head):
    """The perceptron, of one pair of positions."""
    t = torch.stack([torch.tensor(math.copysign(math.log2(abs(r / (p - 1) * 8) + 1) / 3, r), dtype=torch.float64)
                     for r, p in zip(distances, layer.pretrain_size, strict=True)])
    return layer.cpb_fc2(layer.cpb_fc1(t).relu())[head]


def unit(u):
    return u / max(u.norm(), 1e-12)


def parts(y, count):
    return y.view(count, 3, 4)


def query(layer, q, head, keys):
    return (unit(q) + layer.query_embedding[head, 0]) * F.softplus(layer.temperature[head, 0, 0]) * math.log(keys)


def cells(n, ratio):
    """First and last position of adaptive average pooling's cells."""
    count = max(n // ratio, 1)
    return [(i * n // count, math.ceil((i + 1) * n / count) - 1) for i in range(count)]


def oracle(layer, x):
    """The formulas, a loop over images, heads and positions."""
    b, h, w, _ = x.shape
    pooling = isinstance(layer, AggregatedAttention)
    out = []
    for n in range(b):
        places = [(i, j) for i in range(h) for j in range(w)]
        if pooling:
            at = {place: (layer.q(x[n][place]), *parts(layer.kv(x[n][place]), 2)) for place in places}
            activated = F.gelu(x[n] @ layer.sr.weight.flatten(1).T + layer.sr.bias)
            far = []
            for top, bottom in cells(h, layer.sr_ratio):
                for left, right in cells(w, layer.sr_ratio):
                    mean = activated[top:bottom + 1, left:right + 1].mean((0, 1))
                    far.append((((top + bottom) / 2, (left + right) / 2), *parts(layer.kv(layer.norm(mean)), 2)))
        else:
            at = {place: layer.qkv(x[n][place]).view(3, 12) for place in places}
            at = {place: (y[0], y[1].view(3, 4), y[2].view(3, 4)) for place, y in at.items()}
            far = [(place, k, v) for place, (_, k, v) in at.items()]
        for i, j in places:
            heads = []
            for head in range(3):
                q = at[i, j][0].view(3, 4)[head]
                slots = [(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)] if pooling else []
                near = [(slot, place) for slot, place in enumerate(slots) if place in at]
                scaled = query(layer, q, head, len(near) + len(far))
                logits = [scaled @ unit(at[place][1][head]) + layer.relative_pos_bias_local[head, slot] for slot, place in near]
                logits += [scaled @ unit(k[head]) + bias(layer, (i - y, j - z), head) for (y, z), k, _ in far]
                weights = torch.stack(logits).softmax(0)
                learned = unit(q) @ layer.learnable_tokens[head] + layer.learnable_bias[head, 0] if pooling else []
                value = sum((weights[m] + learned[slot]) * at[place][2][head] for m, (slot, place) in enumerate(near))
                heads.append(value + sum(weights[len(near) + m] * v[head] for m, (_, _, v) in enumerate(far)))
            gates = layer.router(x[n, i, j]) if layer.router is not None else torch.ones(3)
            out.append(layer.proj(torch.cat([gate * head for gate, head in zip(gates, heads, strict=True)])))
    return torch.stack(out).view(b, h, w, 12)


KINDS = {
    "aggregated": (AggregatedAttention, dict(sr_ratio=2)), "far": (AggregatedAttention, dict(sr_ratio=4, qkv_bias=False)),
    "every position is a pool": (AggregatedAttention, dict(sr_ratio=1, shared_heads=1, active_heads=1)),
    "length scaled": (LengthScaledAttention, {}), "gated": (LengthScaledAttention, dict(shared_heads=0, active_heads=2, qkv_bias=False)),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_its_definition_forward_and_backward(kind, size):
    layer, x = made(KINDS[kind][0], **KINDS[kind][1]), image(*size)
    again = x.detach().clone().requires_grad_()
    out, expected = layer(x), oracle(layer, again)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    inputs = [parameter for name, parameter in layer.named_parameters() if min(size) > 1 or "routed" not in name]
    grads = (torch.autograd.grad(y.square().sum(), [of, *inputs], allow_unused=True) for y, of in ((out, x), (expected, again)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(*(torch.zeros(()) if g is None or not g.abs().max() > 1e-12 else g for g in (ours, theirs)))


def test_large_tables_without_gradients_are_made_in_pieces(monkeypatch):
    monkeypatch.setattr("zoo.layers.aggregated_attention.PIECE", 20)
    layer, x = made(AggregatedAttention, sr_ratio=2), image(9, 7)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.detach()).detach())
    pieces = []
    layer.cpb_fc1.register_forward_hook(lambda module, inputs, out: pieces.append(out.numel() // out.shape[-1]))
    expected = layer(x)
    assert pieces == [31 * 23]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert max(pieces[1:]) == 23 and sum(pieces[1:]) == 31 * 23


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(dtype):
    for kind, args in (KINDS["aggregated"], KINDS["gated"]):
        layer, x = made(kind, **args), image(20, 30).detach()
        expected = layer(x)
        error = (layer.to(dtype)(x.to(dtype)).double() - expected).abs()
        assert error.mean() < 0.05 * expected.abs().mean()


def test_no_window_is_kept_for_the_backward_pass():
    layer, x, kept = AggregatedAttention(96, 4, 8), torch.randn(1, 48, 48, 96), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    table = 89 * 89 * 512 * 4  # of offsets, whatever the batch
    maps = sum(kept.values()) / (x.numel() * 4) - table / (x.numel() * 4)
    assert maps < 30, f"{maps:.1f} maps, where the 9 neighbours of keys and values alone would be 18 and their products as many"


@pytest.mark.parametrize("make, message", [
    (lambda: AggregatedAttention(10, 3), r"num_heads must divide dim \(10\), got 3"),
    (lambda: AggregatedAttention(12, 3, 0), "sr_ratio must be at least 1, got 0"),
    (lambda: LengthScaledAttention(12, 3, (7, 1)), r"pretrain_size must be a height and a width of at least 2, got \(7, 1\)"),
    (lambda: LengthScaledAttention(12, 3)(torch.randn(2, 12, 4, 4)),
     r"LengthScaledAttention: x must be \(B, H, W, 12\), got shape \(2, 12, 4, 4\)"),
])
def test_bad_input_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gates_are_where_they_are_asked_for():
    assert LengthScaledAttention(12, 3).router is None
    assert isinstance(AggregatedAttention(12, 3, shared_heads=3).router, MixtureOfHeads)
