"""The losses of connections where the authors have no numbers; theirs are in tests/models/test_conformance.py."""
import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.errors import InputError
from zoo.layers import bilateral_voting, connectivity_target

VARIANTS = [dict(variant="bicon"), dict(variant="dconn"), dict(variant="dconn", votes=0.0)]
variants = pytest.mark.parametrize("args", VARIANTS, ids=str)


def case(classes=1, size=(9, 7), batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(batch, 8 * classes, *size, generator=generator).to(dtype)
    return maps, torch.randint(max(2, classes), (batch, *size), generator=generator)


@pytest.mark.parametrize("args", VARIANTS[1:], ids=str)
def test_without_any_edge_there_is_no_loss_of_edges(args):
    maps, labels = case()
    found = zoo.ConnectivityLoss(**args)(maps.requires_grad_(), 0 * labels)
    p, v = bilateral_voting(maps.sigmoid())
    expected = F.binary_cross_entropy(p, 0 * p) + F.binary_cross_entropy(maps.sigmoid(), 0 * maps)
    expected = expected + args.get("votes", 0.2) * F.binary_cross_entropy(v, 0 * v) + (1 - 1e-4 / (p.sum((2, 3)) + 1e-4)).mean()
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found, maps)[0].isfinite().all()


@variants
def test_pixels_that_are_ignored_do_not_count(args):
    maps, labels = case()
    loss = zoo.ConnectivityLoss(**args, ignore_index=255)
    torch.testing.assert_close(loss(maps, labels), zoo.ConnectivityLoss(**args)(maps, labels))
    labels[:, 4:, 2:5] = 255
    maps.requires_grad_()
    found = loss(maps, labels)
    inner = torch.autograd.grad(found, maps)[0][:, :, 5:, 3:4]  # with their neighbours
    assert found.isfinite() and not inner.any()
    assert loss(maps, torch.full_like(labels, 255)).isfinite()


def test_pixels_that_are_ignored_do_not_count_among_classes():
    maps, labels = case(3)
    loss = zoo.ConnectivityLoss(ignore_index=255)
    torch.testing.assert_close(loss(maps, labels), zoo.ConnectivityLoss()(maps, labels))
    labels[0, :4] = 255
    assert not torch.autograd.grad(loss(maps.requires_grad_(), labels), maps)[0][0, :, :3].any()
    assert loss(maps, torch.full_like(labels, 255)).isfinite()


@variants
def test_right_connections_cost_next_to_nothing(args):
    _, labels = case(size=(20, 20))
    labels = F.max_pool2d(labels[:, None].float(), 3, 1, 1).mul(labels[:, None].roll(1, 3)).long()[:, 0]
    con = connectivity_target(labels[:, None].float())
    labels = bilateral_voting(con)[0][:, 0].long()  # without single pixels
    loss, least = zoo.ConnectivityLoss(**args), float(args["variant"] == "dconn")  # as -log(1 - q) / q is at least 1
    assert loss(40 * con - 20, labels) - least < 1e-2 < loss(20 - 40 * con, labels) - least


def test_every_auxiliary_map_adds_its_share():
    maps, labels = case(3)
    loss, other = zoo.ConnectivityLoss(auxiliary=0.3), maps.flip(0)
    torch.testing.assert_close(loss((maps, other), labels), loss(maps, labels) + 0.3 * loss(other, labels))


@pytest.mark.parametrize("classes", [1, 4])
def test_low_precision_and_autocast_are_computed_in_float32(classes):
    maps, labels = case(classes)
    loss = zoo.ConnectivityLoss()
    for dtype in (torch.float16, torch.bfloat16):
        low = maps.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(low, labels)
        assert found.dtype == torch.float32 and torch.equal(found, loss(low.float(), labels))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (8, 5)], ids=str)
def test_sizes_layouts_and_compiling(classes, size):
    maps, labels = case(classes, size, batch=1)
    loss = zoo.ConnectivityLoss(ignore_index=255)
    expected = loss(maps, labels)
    assert expected.isfinite()
    torch.testing.assert_close(loss(maps.to(memory_format=torch.channels_last), labels), expected)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(maps, labels), expected)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: zoo.ConnectivityLoss("biconn"), "variant must be bicon or dconn, got 'biconn'"),
    (lambda: zoo.ConnectivityLoss(votes=2), "votes must be from 0 to 1, got 2"),
    (lambda: zoo.ConnectivityLoss(auxiliary=-1), "auxiliary must be at least 0, got -1"),
    (lambda: zoo.ConnectivityLoss()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4).long()), r"maps must be \(B, 8 K, H, W\)"),
    (lambda: zoo.ConnectivityLoss()(torch.zeros(2, 8, 4, 4), torch.zeros(2, 1, 4, 4)), r"labels must be \(2, 4, 4\), .*\(2, 1, 4, 4\)"),
    (lambda: zoo.ConnectivityLoss("bicon")(*case(3)), "the loss of BiconNet is for one class"),
])
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
