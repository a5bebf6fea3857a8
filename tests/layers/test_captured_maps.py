"""What layers report is what they computed with: their output can be made from it."""
import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.layers import DAS, ATConv, BiLevelRoutingAttention, PolarizedSelfAttention, SelectiveKernelUnit


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


def test_models_report_every_block_by_name_and_nothing_afterwards():
    model = zoo.biformer.biformer_nano().eval()
    with torch.no_grad(), zoo.capture(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    routing = [name for name, module in model.named_modules() if isinstance(module, BiLevelRoutingAttention)]
    assert set(routing) <= set(maps) and len(routing) > 1
    held = {name: set(found) for name, found in maps.items()}
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert held == {name: set(found) for name, found in maps.items()}
    assert not any(vars(module).keys() & {"_takes_reports"} for module in model.modules())
