"""Connections of pixels, against loops over pixels; the authors' numbers are in tests/models/test_conformance.py."""
import io

import pytest
import torch
from torch import nn

from zoo.layers import bilateral_voting, connectivity_target
from zoo.layers.connectivity import DIRECTIONS, class_logits, map_channels

SIZES = [(1, 1), (1, 7), (2, 2), (5, 8)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def neighbours(height, width):
    """Every pixel, direction, and the pixel whose content is shifted there, if there is one."""
    for y in range(height):
        for x in range(width):
            for i, (down, right) in enumerate(DIRECTIONS):
                inside = 0 <= y - down < height and 0 <= x - right < width
                yield y, x, i, (y - down, x - right) if inside else None


@sizes
@pytest.mark.parametrize("batch", [1, 3])
def test_target_is_what_two_neighbours_share(size, batch):
    masks = (numbers(batch, 2, *size) > 0).float()
    expected = torch.zeros(batch, 2, 8, *size)
    for y, x, i, other in neighbours(*size):
        if other:
            expected[:, :, i, y, x] = masks[:, :, y, x] * masks[:, :, other[0], other[1]]
    assert torch.equal(connectivity_target(masks), expected.flatten(1, 2))
    assert torch.equal(connectivity_target(masks.bool()), expected.flatten(1, 2).bool())


@sizes
def test_votes_are_of_both_ends(size):
    maps = numbers(2, 24, *size)
    given, expected = maps.view(2, 3, 8, *size), torch.zeros(2, 3, 8, *size)
    for y, x, i, other in neighbours(*size):
        if other:
            expected[:, :, i, y, x] = given[:, :, i, y, x] * given[:, :, 7 - i, other[0], other[1]]
    masks, votes = bilateral_voting(maps)
    assert torch.equal(votes, expected) and torch.equal(masks, expected.amax(2))


def test_directions_are_opposite_and_a_vote_is_seen_from_both_ends():
    assert all(DIRECTIONS[7 - i] == (-down, -right) for i, (down, right) in enumerate(DIRECTIONS))
    votes = bilateral_voting(numbers(1, 8, 6, 7))[1][0, 0]
    assert torch.equal(votes[1, 1:], votes[6, :-1]) and torch.equal(votes[0, 1:, 1:], votes[7, :-1, :-1])


def test_masks_come_back_from_their_own_connections_but_for_single_pixels():
    masks = (numbers(2, 3, 20, 17) > 0.5).float()
    con = connectivity_target(masks)
    alone = con.unflatten(1, (3, 8)).amax(2) == 0
    assert torch.equal(bilateral_voting(con)[0], masks * ~alone) and (alone & (masks > 0)).any()
    con = connectivity_target(masks[:, :1])
    assert torch.equal(class_logits(20 * con - 10, 2).argmax(1), bilateral_voting(con)[0][:, 0].long())


@sizes
@pytest.mark.parametrize("scale", [1, 30])
def test_logits_of_one_class_are_those_of_the_voted_probability(size, scale):
    z = scale * numbers(2, 8, *size, dtype=torch.float64)
    p = bilateral_voting(z.sigmoid())[0]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        found = class_logits(z.to(dtype), 1)
        assert found.dtype == dtype and found.isfinite().all()
        torch.testing.assert_close(found.double().sigmoid(), bilateral_voting(z.to(dtype).double().sigmoid())[0], atol=tolerance, rtol=0)
    two = class_logits(z, 2)
    torch.testing.assert_close(two.softmax(1)[:, 1:], p, atol=1e-9, rtol=0)
    assert torch.equal(two[:, :1], torch.zeros_like(p))
    assert torch.equal(class_logits(torch.cat([z, z, -z], 1), 3), bilateral_voting(torch.cat([z, z, -z], 1))[0])


def test_confident_logits_keep_their_digits():
    found = class_logits(torch.full((1, 8, 3, 3), 25.0), 1)
    torch.testing.assert_close(found, torch.full_like(found, 25.0 - torch.log(torch.tensor(2.0)).item()))
    assert (class_logits(torch.full((1, 8, 3, 3), 80.0), 1) > 79).all()


def test_how_many_maps_there_are():
    assert [map_channels(classes) for classes in range(5)] == [0, 8, 8, 24, 32]


def test_gradients_of_every_order():
    z = numbers(1, 8, 3, 4, dtype=torch.float64).requires_grad_()
    for function in (lambda z: class_logits(z, 2), lambda z: torch.cat([x.flatten() for x in bilateral_voting(z)])):
        assert torch.autograd.gradcheck(function, z) and torch.autograd.gradgradcheck(function, z)


@pytest.mark.parametrize("make", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.flip(0)[:, :, ::2].mT, lambda x: x[:1]])
def test_layouts(make):
    maps = make(numbers(2, 24, 6, 5))
    for function in (lambda x: bilateral_voting(x)[1], lambda x: class_logits(x, 3), lambda x: connectivity_target((x > 0).float())):
        assert torch.equal(function(maps), function(maps.contiguous()))


class Voting(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, maps):
        return class_logits(maps, self.classes)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_compiles_and_exports(classes):
    maps = 8 * numbers(2, map_channels(classes), 9, 7)
    expected = class_logits(maps, classes)
    assert torch.equal(torch.compile(Voting(classes), fullgraph=True, backend="aot_eager")(maps), expected)
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(Voting(classes), (maps,), dynamic_shapes=(free,))
    other = numbers(1, maps.shape[1], 4, 11)
    torch.testing.assert_close(program.module()(other), class_logits(other, classes))
    onnxruntime = pytest.importorskip("onnxruntime")
    buffer = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    for x in (maps, other, 30 * other):
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(found, class_logits(x, classes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: connectivity_target(torch.zeros(2, 4, 4)), r"masks must be \(B, C, H, W\), got shape \(2, 4, 4\)"),
    (lambda: bilateral_voting(torch.zeros(2, 12, 4, 4)), r"maps must be \(B, 8 C, H, W\), got shape \(2, 12, 4, 4\)"),
    (lambda: class_logits(torch.zeros(2, 16, 4, 4), 2), r"maps must be \(B, 8, H, W\) for 2 classes, got shape \(2, 16, 4, 4\)"),
])
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
