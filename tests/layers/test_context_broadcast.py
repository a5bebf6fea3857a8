import pytest
import torch

from zoo.layers import ContextBroadcast


def oracle(x, scale=None):
    """A loop over images and tokens."""
    images = []
    for image in x.flatten(1, -2):
        mean = sum(image) / len(image)
        images.append(torch.stack([(token + mean) / 2 if scale is None else token + scale * mean for token in image]))
    return torch.stack(images).reshape(x.shape)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 6), (1, 1, 6), (3, 4, 5, 6)], ids=str)
def test_is_the_formula_on_tokens_and_maps(shape, scaled):
    layer, x = ContextBroadcast(6, scaled).double(), torch.randn(shape, dtype=torch.float64)
    if scaled:
        torch.nn.init.normal_(layer.scale)
    torch.testing.assert_close(layer(x), oracle(x, layer.scale))
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_halves_the_distance_to_the_mean_and_keeps_it():
    layer, x = ContextBroadcast(5), torch.randn(2, 9, 5)
    mean = x.mean(1, keepdim=True)
    torch.testing.assert_close(layer(x).mean(1, keepdim=True), mean)
    torch.testing.assert_close(layer(x) - mean, (x - mean) / 2)
    assert not list(layer.parameters())


def test_scaled_begins_as_the_identity():
    layer, x = ContextBroadcast(5, scaled=True), torch.randn(2, 9, 5)
    assert torch.equal(layer(x), x)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.scale.grad, 9 * x.mean(1).sum(0))


def test_compiles_and_keeps_the_dtype():
    layer, x = ContextBroadcast(5, scaled=True), torch.randn(2, 9, 5)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        ContextBroadcast(0)
    with pytest.raises(ValueError, match=r"x must be \(B, …, 5\), got shape \(9, 5\)"):
        ContextBroadcast(5)(torch.randn(9, 5))
