"""Dual attention: relations and symbols against their formula, pair by pair."""
import math

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.layers import DualAttention, RelationalAttention, SymbolicAttention
from zoo.measuring.model_benchmark import _peak_memory


def tokens(batch=2, count=7, dim=24):
    return torch.randn(2, batch, count, dim, generator=torch.Generator().manual_seed(1))


def far_from_uniform(layer: nn.Module) -> nn.Module:
    for linear in (layer.wq_attn, layer.wk_attn):
        linear.weight.data.mul_(4)
    return layer


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "tanh", "softplus"])
def test_the_formula(activation, symmetric):
    torch.manual_seed(0)
    layer = far_from_uniform(RelationalAttention(24, 2, 3, total_heads=4, activation=activation, symmetric=symmetric))
    x, symbols = tokens()
    with torch.no_grad(), zoo.capture(layer) as maps:
        out = layer(x, symbols)
    act = {"identity": lambda y: y, "softplus": nn.functional.softplus}.get(activation) or getattr(torch, activation)
    q, k, v, of_q, of_k = (linear(y).detach() for linear, y in (
        (layer.wq_attn, x), (layer.wk_attn, x), (layer.wv, symbols), (layer.wq_rel, x), (layer.wk_rel, x)))
    for b in range(2):
        for i in range(7):
            relations = torch.stack([torch.stack([
                act(of_q[b, i, 4 * r : 4 * r + 4] @ of_k[b, j, 4 * r : 4 * r + 4] / 2) for r in range(3)]) for j in range(7)])
            torch.testing.assert_close(maps[""]["relations"][b, :, i].mT, relations)
            heads = []
            for h in range(2):
                part = slice(6 * h, 6 * h + 6)
                weights = (k[b, :, part] @ q[b, i, part] / math.sqrt(6)).softmax(0)
                torch.testing.assert_close(maps[""]["attention"][b, h, i], weights)
                heads.append(sum(weights[j] * (v[b, j, part] + layer.wr[h] @ relations[j]) for j in range(7)))
            torch.testing.assert_close(out[b, i], layer.wo(torch.cat(heads)), atol=1e-5, rtol=1e-4)
    if symmetric:
        torch.testing.assert_close(maps[""]["relations"], maps[""]["relations"].mT)


def test_symbols_are_mixtures_of_the_library():
    layer, x = SymbolicAttention(24, 3, 5), tokens()[0]
    with zoo.capture(layer) as maps:
        symbols = layer(x)
    q = layer.q_proj(x)
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)
        weights = (q[..., part] @ layer.template_features[:, part].T / math.sqrt(8)).softmax(-1)
        torch.testing.assert_close(maps[""]["attention"][:, h], weights)
        torch.testing.assert_close(symbols[..., part], weights @ layer.symbol_library[:, part])


def test_both_kinds_of_heads_side_by_side_and_either_alone():
    x, symbols = tokens()
    layer = DualAttention(24, 1, 2, 4)
    out = layer(x, symbols)
    torch.testing.assert_close(out, torch.cat([layer.self_attention(x), layer.relational_attention(x, symbols)], -1))
    assert layer.self_attention(x).shape[-1] == 8 and layer.relational_attention(x, symbols).shape[-1] == 16
    plain = DualAttention(24, 3, 0)
    theirs = timm.layers.Attention(24, 3, proj_bias=False).eval()
    with torch.no_grad():
        theirs.qkv.weight.copy_(torch.cat([getattr(plain.self_attention, name).weight for name in ("wq", "wk", "wv")]))
        theirs.proj.weight.copy_(plain.self_attention.wo.weight)
    torch.testing.assert_close(plain(x, symbols), theirs(x))
    assert DualAttention(24, 0, 3)(x, symbols).shape == x.shape


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_masked_keys_are_as_if_they_were_not_there(activation):
    x, symbols = tokens(count=9)
    layer = DualAttention(24, 2, 2, 4, activation)
    expected = layer(x[:, :6], symbols[:, :6])
    keys = torch.arange(9) < 6
    for mask in (keys.view(1, 1, 1, 9), torch.where(keys, 0.0, -torch.inf).expand(9, 9)):
        torch.testing.assert_close(layer(x, symbols, attn_mask=mask)[:, :6], expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(layer(x, symbols, is_causal=True)[:, :6], layer(x[:, :6], symbols[:, :6], is_causal=True))


def test_dropout_is_of_training_only():
    x, symbols = tokens()
    for layer, args in ((SymbolicAttention(24, 3, 5, attn_drop=0.5), (x,)), (DualAttention(24, 2, 2, attn_drop=0.5), (x, symbols)),
                        (DualAttention(24, 2, 2, activation="relu", proj_drop=0.5), (x, symbols))):
        assert torch.equal(layer.eval()(*args), layer(*args))
        assert not torch.equal(layer.train()(*args), layer(*args))


def test_relations_of_all_pairs_are_never_made_where_they_need_not_be():
    def run(layer, x):
        with torch.inference_mode():
            layer(x, x)

    x = torch.randn(1, 600, 32)
    linear, other = (_peak_memory(run, RelationalAttention(32, 1, 16, activation=name).eval(), x) for name in ("identity", "relu"))
    pairs = 4 * 600 * 600
    assert linear < 6 * pairs < 16 * pairs < other  # bytes, of one number for every pair


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_compiles_and_exports(activation):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.retrieve, self.attention = SymbolicAttention(24, 2, 5), DualAttention(24, 2, 2, 4, activation)

        def forward(self, x):
            return self.attention(x, self.retrieve(x))

    model, x = Both().eval(), tokens()[0]
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        free = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=999)}
        program = torch.export.export(model, (x,), dynamic_shapes=(free,))
        torch.testing.assert_close(program.module()(x[:1, :4]), model(x[:1, :4]), atol=1e-6, rtol=1e-5)
        low = model.bfloat16()(x.bfloat16())
        torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RelationalAttention(24, 5), r"num_heads must divide dim \(24\), got 5"),
    (lambda: RelationalAttention(24, 2, 5), r"num_relations must divide the width of the relational heads \(24\), got 5"),
    (lambda: RelationalAttention(24, 2, activation="square"), "activation must be one of identity, relu, .*, got 'square'"),
    (lambda: DualAttention(24, 0, 0), r"self_heads \+ relational_heads must divide dim \(24\), got 0"),
    (lambda: DualAttention(24, -1, 4), "self_heads and relational_heads must be at least 0, got -1 and 4"),
    (lambda: SymbolicAttention(24, 5), r"num_heads must divide dim \(24\), got 5"),
    (lambda: SymbolicAttention(24, 4, 0), "num_symbols must be at least 1, got 0"),
    (lambda: RelationalAttention(24, 2)(tokens()[0], tokens()[1][:1]), r"symbols of the shape of x, \(2, 7, 24\), got \(1, 7, 24\)"),
])
def test_wrong_arguments_are_named(make, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()
