import math

import pytest
import torch

from zoo.layers import ChannelProcessing, FullyAttentionalBlock, TokenAwareAvgPool, TokenMixing


def made(layer, seed=0):
    """With parameters that are not at rest."""
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer.double().eval()


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def attention_oracle(layer, x):
    """Multi-head attention, a loop over images, heads and queries."""
    tokens, width = x.flatten(1, 2), x.shape[-1] // layer.num_heads
    q, (k, v) = linear(layer.q, tokens), linear(layer.kv, tokens).chunk(2, -1)
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for channels in (slice(start, start + width) for start in range(0, x.shape[-1], width)):
            for i in range(tokens.shape[1]):
                exponentials = torch.stack([((q[b, i, channels] * key).sum() / math.sqrt(width)).exp() for key in k[b, :, channels]])
                out[b, i, channels] = (exponentials / exponentials.sum()) @ v[b, :, channels]
    return linear(layer.proj, out).reshape(x.shape)


def gate_oracle(layer, x):
    """Channel attention, a loop over images and channels."""
    tokens, heads = x.flatten(1, 2), len(layer.temperature)
    q, width = linear(layer.q, tokens), x.shape[-1] // heads
    gate = torch.zeros(len(x), x.shape[-1], dtype=x.dtype)
    for b, c in torch.cartesian_prod(torch.arange(len(x)), torch.arange(x.shape[-1])).tolist():
        head = range(c // width * width, (c // width + 1) * width)
        k = sum(tokens[b, :, other].exp() / tokens[b, :, other].exp().sum() for other in head) / width
        score = (q[b, :, c].exp() / q[b, :, c].exp().sum() * k).sum()
        gate[b, c] = layer.temperature[c // width].squeeze() / (1 + (-score).exp())
    return gate


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (1, 1)], ids=str)
def test_token_mixing_is_attention(size):
    layer, x = made(TokenMixing(8, 2)), torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), attention_oracle(layer, x)
    torch.testing.assert_close((out, *torch.autograd.grad(out.square().sum(), x)),
                               (expected, *torch.autograd.grad(expected.square().sum(), x)))
    attention = layer.attention(x)
    assert attention.shape == (2, 2, math.prod(size), math.prod(size))
    values = linear(layer.kv, x).chunk(2, -1)[1].flatten(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(linear(layer.proj, (attention @ values).transpose(1, 2).reshape(x.shape)), out)


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (1, 1)], ids=str)
def test_channel_processing_is_the_formula(size):
    layer, x = made(ChannelProcessing(8, 2, 12)), torch.randn(2, *size, 8, dtype=torch.float64)
    gate = gate_oracle(layer, x)
    torch.testing.assert_close(layer.attention(x), gate)
    mlp, lpi = layer.mlp, layer.mlp.dwconv
    hidden = linear(mlp.fc1, x)
    local = lpi.conv2(lpi.bn(torch.nn.functional.gelu(lpi.conv1(hidden.permute(0, 3, 1, 2))))).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), gate[:, None, None] * layer.norm(linear(mlp.fc2, hidden + mlp.gamma * local)))


@pytest.mark.parametrize("num_scales", [None, 3])
def test_block(num_scales):
    block, x = made(FullyAttentionalBlock(8, 2, num_scales=num_scales)), torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    pooled = x if num_scales is None else block.pool(x)
    mixed = x + block.ls1.gamma * block.attn(block.norm1(pooled))
    torch.testing.assert_close(block(x), mixed + block.ls2.gamma * block.mlp(block.norm2(mixed)))
    assert torch.autograd.gradcheck(block, x, fast_mode=True)


def test_the_pool_of_one_scale_changes_nothing():
    block, x = made(FullyAttentionalBlock(8, 2, num_scales=1)), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    expected = block(x)
    assert isinstance(block.pool, TokenAwareAvgPool)
    block.pool = torch.nn.Identity()
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_and_strided(dtype):
    block, x = FullyAttentionalBlock(8, 2, num_scales=3).eval(), torch.randn(2, 8, 5, 4).permute(0, 2, 3, 1)
    expected = block(x.contiguous())
    torch.testing.assert_close(block(x), expected)
    assert (block.to(dtype)(x.to(dtype)) - expected).abs().max() < 0.1


def test_compiles_whole():
    block, x = FullyAttentionalBlock(8, 2, num_scales=3), torch.randn(2, 4, 5, 8)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_heads_have_to_divide():
    with pytest.raises(ValueError, match=r"num_heads must divide dim \(8\), got 3"):
        FullyAttentionalBlock(8, 3)
