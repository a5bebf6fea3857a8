"""Parts from tokens, patch by patch against the formula; noise, masks and their gradient."""
import copy

import pytest
import torch

import zoo
from zoo.layers import PartDiscovery


def layer(**args) -> PartDiscovery:
    torch.manual_seed(0)
    made = PartDiscovery(12, 3, **args)
    with torch.no_grad():
        made.prototypes.mul_(4)
        made.modulation.weight.uniform_(0.5, 2)
        made.modulation.bias.normal_()
    return made


def tokens(batch=2, height=4, width=5, dtype=torch.float32):
    return torch.randn(batch, height, width, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 1, 1), (3, 7, 2)])
def test_the_formula(shape):
    made, x = layer().eval(), tokens(*shape)
    with torch.no_grad(), zoo.capture(made) as captured:
        parts = made(x)
    batch, height, width = shape
    pooled = torch.zeros(batch, 12, 4)
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                y = x[b, row, column]
                share = torch.stack([-(y - w).square().sum() for w in made.prototypes]).softmax(0).detach()
                torch.testing.assert_close(parts.maps[b, :, row, column], share, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(parts.products[b, :, row, column], (made.prototypes @ y).detach())
                torch.testing.assert_close(parts.soft_mask[b, :, row, column], torch.stack([share[:3].max(), share[3]]),
                                           atol=1e-5, rtol=1e-4)
                assert parts.mask[b, row, column] == float(share[:3].max() >= share[3])
                pooled[b] += y[:, None] * share / (height * width)
        mean, variance = pooled[b].mean(), pooled[b].var(correction=0)
        expected = (pooled[b] - mean) / (variance + 1e-5).sqrt() * made.modulation.weight + made.modulation.bias
        torch.testing.assert_close(parts.features[b], expected.T, atol=1e-4, rtol=1e-3)
    assert captured[""].keys() == {"maps", "mask", "soft_mask"} and torch.equal(captured[""]["mask"], parts.mask)


def test_the_mask_is_0_or_1_and_has_the_gradient_of_the_sum_over_parts():
    made, x = layer().eval(), tokens().requires_grad_()
    parts, weights = made(x), torch.randn(2, 4, 5)
    assert set(parts.mask.unique().tolist()) == {0.0, 1.0}
    found, = torch.autograd.grad((parts.mask * weights).sum(), x, retain_graph=True)
    expected, = torch.autograd.grad((parts.maps[:, :3].sum(1) * weights).sum(), x)
    torch.testing.assert_close(found, expected)


def test_noise_is_of_training_unless_it_is_asked_for_always():
    x = tokens()
    quiet, loud = layer(), layer(noise="always")
    for made, training, noisy in ((quiet, False, False), (quiet, True, True), (loud, False, True), (loud, True, True)):
        first, second = (made.train(training)(x).maps for _ in range(2))
        assert torch.equal(first, second) != noisy
    smooth = layer(noise="always", noisy_maps=False)
    first, second = smooth(x), smooth(x)
    assert torch.equal(first.maps, second.maps) and not torch.equal(first.soft_mask, second.soft_mask)
    assert torch.equal(first.maps, quiet.eval()(x).maps)


def test_noise_assigns_patches_in_the_proportions_of_the_maps():
    x = tokens(1, 1, 1).expand(1, 100, 100, 12)
    assigned = layer(noise="always").eval()(x).maps.argmax(1).flatten().bincount(minlength=4) / 10000
    torch.testing.assert_close(assigned, layer().eval()(x).maps[0, :, 0, 0], atol=0.02, rtol=0)


def test_parts_are_dropped_from_masks_in_training_and_the_rest_keeps_its_values():
    made, whole = layer(mask_drop_rate=0.6), layer().eval()(tokens())
    made.exponential = torch.ones_like  # whose logarithms are no noise
    lacking = 0
    for _ in range(20):
        parts = made(tokens())
        torch.testing.assert_close(parts.maps, whole.maps)
        torch.testing.assert_close(parts.soft_mask[:, 1], whole.soft_mask[:, 1])
        assert (parts.soft_mask[:, 0] <= whole.soft_mask[:, 0] + 1e-6).all()
        lacking += sum(not torch.allclose(ours, theirs) for ours, theirs in zip(parts.soft_mask[:, 0], whole.soft_mask[:, 0], strict=True))
    assert 20 < lacking < 40
    assert torch.equal(made.eval()(tokens()).mask, whole.mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    exact = layer().double().eval()(tokens(dtype=torch.float64))
    parts = layer().to(dtype).eval()(tokens(dtype=dtype))
    assert parts.features.dtype == dtype and parts.maps.dtype == parts.mask.dtype == torch.promote_types(dtype, torch.float32)
    assert (parts.maps - exact.maps).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        under = layer().eval()(tokens())
    torch.testing.assert_close(under.maps, layer().eval()(tokens()).maps)


def test_layouts_of_memory_batches_and_graphs():
    made, x = layer().eval(), tokens(3)
    expected = made(x)
    strided = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert not strided.is_contiguous()
    torch.testing.assert_close(made(strided), expected)
    torch.testing.assert_close(made(x[1:2]).maps, expected.maps[1:2])
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), expected)
    training = torch.compile(copy.deepcopy(made).train(), fullgraph=True, backend="aot_eager")
    parts = training(x)
    torch.testing.assert_close(parts.maps.sum(1), torch.ones(3, 4, 5))
    parts.mask.sum().backward()
    assert training.prototypes.grad.abs().sum() > 0


@pytest.mark.parametrize(("args", "message"), [
    (dict(num_parts=0), "dim and num_parts must be at least 1, got 12 and 0"),
    (dict(noise="never"), "noise must be one of training, always, got 'never'"),
    (dict(mask_drop_rate=1.0), "mask_drop_rate must be at least 0 and less than 1, got 1.0"),
])
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        PartDiscovery(12, **args)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"PartDiscovery: x must be \(B, H, W, 12\), got shape \(2, 20, 12\)"):
        layer()(tokens().flatten(1, 2))
