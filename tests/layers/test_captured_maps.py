"""What layers report is what they computed with: their output can be made from it."""
import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.kernels._regions import cut, paste
from zoo.kernels.token_aware_avg_pool.reference import token_aware_avg_pool
from zoo.layers import (
    DAS,
    ATConv,
    BiLevelRoutingAttention,
    ContextBroadcast,
    HaloAttention,
    HiLoAttention,
    PolarizedSelfAttention,
    SelectiveKernelUnit,
    TokenAwareAvgPool,
)


def captured(layer, x):
    layer.eval()
    with torch.no_grad(), zoo.capture(layer) as maps:
        out = layer(x)
    return out, maps[""]


def randomized(layer):
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("soft_routing", [False, True])
def test_routes_and_routed_attention(soft_routing):
    layer = randomized(BiLevelRoutingAttention(8, 2, (2, 3), 4, lepe_kernel=0, out_proj=False, soft_routing=soft_routing))
    x = torch.randn(2, 4, 9, 8)
    out, maps = captured(layer, x)
    assert maps["routes"].shape == maps["affinity"].shape == (2, 6, 4)
    attention = maps["attention"]
    assert attention.shape == (2, 6, 2, 6, 24)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 6, 2, 6))
    by_region = layer.qkv(x)[..., 16:].reshape(2, 2, 2, 3, 3, 2, 4).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, 6, 2, 6, 4)
    factors = (maps["affinity"] * layer.scale).softmax(-1) if soft_routing else torch.ones(2, 6, 4)
    for b in range(2):
        for region in range(6):
            routed = [by_region[b, to] * factor for to, factor in zip(maps["routes"][b, region], factors[b, region], strict=True)]
            expected = attention[b, region] @ torch.cat(routed, 1)
            row, column = region // 3 * 2, region % 3 * 3
            found = out[b, row : row + 2, column : column + 3].reshape(6, 2, 4).transpose(0, 1)
            torch.testing.assert_close(found, expected)


def test_no_attention_to_what_lies_outside_the_map():
    _, maps = captured(randomized(BiLevelRoutingAttention(8, 2, 2, 4)), torch.randn(1, 3, 4, 8))
    lower = (maps["routes"] >= 2).repeat_interleave(4, 2)[:, :, None, None]
    second_row = torch.arange(16).remainder(4) >= 2
    assert maps["attention"].masked_select(lower & second_row).eq(0).all()


def test_offsets_and_gate_of_das():
    layer, x = randomized(DAS(8)), torch.randn(2, 8, 5, 7)
    out, maps = captured(layer, x)
    assert maps["offset"].shape == (2, 18, 5, 7) and maps["offset"].any()
    torch.testing.assert_close(out, x * maps["gate"])


def test_weights_of_selective_kernels():
    layer, x = randomized(SelectiveKernelUnit(8, kernel_sizes=(3, 5, 7))), torch.randn(2, 8, 5, 7)
    out, maps = captured(layer, x)
    torch.testing.assert_close(out, (maps["weights"] * torch.stack(layer.branches(x), 1)).sum(1))


@pytest.mark.parametrize("layout", ["parallel", "sequential"])
def test_gates_of_polarized_attention(layout):
    layer, x = randomized(PolarizedSelfAttention(8, layout)), torch.randn(2, 8, 5, 7)
    out, maps = captured(layer, x)
    channel, spatial = maps["channel"], maps["spatial"]
    torch.testing.assert_close(out, x * (channel + spatial if layout == "parallel" else channel * spatial))


def test_kernels_of_attentive_convolution():
    layer, x = randomized(ATConv(8, 5)), torch.randn(2, 8, 6, 7)
    out, maps = captured(layer, x)
    convolved = F.conv2d(layer.x_proj(x).reshape(1, 16, 6, 7), maps["kernels"].reshape(16, 1, 5, 5), padding=2, groups=16)
    torch.testing.assert_close(out, layer.proj(convolved.reshape(2, 8, 6, 7)))


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_high_and_low_attention(size):
    layer, x = randomized(HiLoAttention(16, 4, window=2, alpha=0.5)), torch.randn(2, *size, 16)
    out, maps = captured(layer, x)
    rows, columns = ((n + 1) // 2 for n in size)
    padded = F.pad(x, (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    values = cut(layer.hi_qkv(padded), (rows, columns), (2, 2), 6).chunk(3, 1)[2]
    high = layer.hi_proj(paste(maps["hi"] @ values, (rows, columns), (2, 2))[:, : size[0], : size[1]])
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True).flatten(2).transpose(1, 2)
    values = layer.lo_kv(means)[..., 8:].unflatten(-1, (2, 4)).transpose(1, 2)
    low = layer.lo_proj((maps["lo"] @ values).transpose(1, 2).reshape(2, *size, 8))
    torch.testing.assert_close(out, torch.cat([high, low], -1))


@pytest.mark.parametrize("stride", [1, 2])
def test_halo_windows(stride):
    layer, x = randomized(HaloAttention(8, 8, stride, num_heads=2, block_size=4, halo_size=1)), torch.randn(2, 8, 7, 10)
    out, maps = captured(layer, x)
    side = 4 // stride
    attention = maps["attention"]
    assert attention.shape == (2, 2, 3, 2, side, side, 6, 6)
    torch.testing.assert_close(attention.sum((-1, -2)), torch.ones(2, 2, 3, 2, side, side))
    values = layer.kv(x).unflatten(1, (2, 8))[:, :, 4:]  # each head's keys, then its values
    values = F.pad(values, (1, 3, 1, 2)).unfold(3, 6, 4).unfold(4, 6, 4)
    found = torch.einsum("nrcmijyx,nmercyx->nmericj", attention, values).reshape(2, 8, 2 * side, 3 * side)
    torch.testing.assert_close(out, found[:, :, : out.shape[2], : out.shape[3]])


def test_weights_of_token_aware_pooling():
    layer, x = randomized(TokenAwareAvgPool(8)), torch.randn(2, 5, 7, 8)
    out, maps = captured(layer, x)
    torch.testing.assert_close(out, token_aware_avg_pool(x, maps["weights"]))


def test_similarity_to_the_context():
    x = torch.randn(2, 5, 8)
    _, maps = captured(ContextBroadcast(8), x)
    for token, found in zip(x.unbind(1), maps["similarity"].unbind(1), strict=True):
        mean = x.mean(1)
        torch.testing.assert_close(found, (token * mean).sum(-1) / token.norm(dim=-1) / mean.norm(dim=-1))


def test_models_report_every_block_by_name_and_nothing_afterwards():
    model = zoo.models.biformer.biformer_nano().eval()
    with torch.no_grad(), zoo.capture(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    routing = [name for name, module in model.named_modules() if isinstance(module, BiLevelRoutingAttention)]
    assert set(routing) <= set(maps) and len(routing) > 1
    held = {name: set(found) for name, found in maps.items()}
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert held == {name: set(found) for name, found in maps.items()}
    assert not any(vars(module).keys() & {"_takes_reports"} for module in model.modules())
