"""Efficient probing and SimPool beside their formulas written out, with the products in the authors' order."""
import pytest
import torch
from torch import nn

import zoo
from zoo.layers import EfficientProbing, SimPool


def randomized(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize(("dim", "queries", "d_out"), [(24, 1, 1), (24, 6, 2), (24, 8, 3), (24, 24, 1)])
def test_queries_gather_their_own_channels(dim, queries, d_out):
    layer, x = randomized(EfficientProbing(dim, queries, d_out)), torch.randn(3, 7, dim)
    with zoo.capture(layer) as maps:
        found = layer(x)
    attention = maps[""]["attention"]
    torch.testing.assert_close(attention, torch.softmax(layer.cls_token[0] @ x.mT / dim**0.5, -1))
    values = layer.v(x).unflatten(-1, (queries, -1))  # (B, N, Q, c)
    torch.testing.assert_close(found, torch.einsum("bqn,bnqc->bqc", attention, values).flatten(1))
    assert found.shape == (3, layer.out_features) == (3, dim // d_out)


def test_simpool_weighs_tokens_by_their_likeness_to_the_mean():
    layer, x = randomized(SimPool(16)), torch.randn(2, 9, 16)
    with zoo.capture(layer) as maps:
        found = layer(x)
    y = layer.norm_patches(x)
    attention = torch.softmax(layer.wq(x.mean(1, keepdim=True)) @ layer.wk(y).mT / 4, -1)
    torch.testing.assert_close(maps[""]["attention"], attention)
    torch.testing.assert_close(found, (attention @ y)[:, 0])


@pytest.mark.parametrize("layer", [EfficientProbing(16, 4), SimPool(16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_autocast(layer, dtype):
    x = torch.randn(2, 5, 16)
    expected = layer.float()(x)
    bound = dict(rtol=0.05, atol=0.02)
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).float(), expected, **bound)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, **bound)


@pytest.mark.parametrize("layer", [EfficientProbing(16, 4), SimPool(16)])
def test_any_number_of_tokens_compiles_and_exports(layer):
    x = torch.randn(2, 6, 16)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("n")}}).module()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for shape in ((2, 6, 16), (3, 1, 16), (5, 11, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), layer(x))
        torch.testing.assert_close(compiled(x), layer(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_queries must divide dim / d_out into whole chunks, got 5 for 24 / 2"):
        EfficientProbing(24, 5, 2)
    with pytest.raises(ValueError, match="must be at least 1, got 24, 0 and 1"):
        EfficientProbing(24, 0)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        SimPool(0)
    for layer in (EfficientProbing(24, 4), SimPool(24)):
        for shape in ((2, 24), (2, 4, 23), (2, 24, 4, 4)):
            with pytest.raises(ValueError, match=rf"{type(layer).__name__}: x must be \(B, N, 24\), got shape \({shape[0]}, "):
                layer(torch.zeros(shape))
