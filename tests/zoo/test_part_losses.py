"""What maps of parts should be like: each loss on maps of which its value is known, and all of them of a network."""
import math

import pytest
import timm
import torch
from torchvision.transforms.functional import affine

import zoo
from zoo import part_losses
from zoo.errors import InputError
from zoo.losses import concentration, enforced_presence, equivariance, orthogonality, pixel_entropy, presence, total_variation


def maps(batch=2, parts=3, height=6, width=5):
    return torch.randn(batch, parts, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)


def one_hot(labels):
    """Of a map of labels, for one image."""
    return torch.nn.functional.one_hot(torch.tensor(labels), 3).permute(2, 0, 1)[None].float()


def network(**args):
    torch.manual_seed(0)
    return timm.create_model("ifam_nano_patch16_224", depth=1, num_classes=5, **args)


def batch(count=3):
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1)), torch.arange(count) % 5


def test_presence_asks_for_3_by_3_patches_of_every_part_somewhere_in_the_batch():
    nowhere, somewhere = torch.zeros(2, 2, 5, 5), torch.zeros(2, 2, 5, 5)
    somewhere[0, 0, 1:4, 2:5] = somewhere[1, 1, :3, :3] = 1
    assert presence(nowhere) == presence(nowhere, "soft_tanh") == 1
    assert presence(somewhere) == presence(somewhere, "soft_constraint") == 0
    somewhere[1, 1, 0, 0] = 0
    torch.testing.assert_close(presence(somewhere), torch.tensor((1 / 9) / 2))
    torch.testing.assert_close(presence(nowhere, "soft_constraint", beta=0.3), torch.tensor(0.3))
    torch.testing.assert_close(presence(somewhere, "tanh"), -torch.tensor([math.tanh(1), math.tanh(8 / 9)]).log().mean())


def test_background_should_be_at_the_edges():
    corner, middle = torch.zeros(1, 7, 7), torch.zeros(1, 7, 7)
    corner[0, :3, :3] = middle[0, 2:5, 2:5] = 1
    assert enforced_presence(corner) == 0 and enforced_presence(middle) > 0.8
    for kind, expected in (("linear", 40 / 49), ("mse", (40 / 49) ** 2), ("log", -math.log(9 / 49))):
        torch.testing.assert_close(enforced_presence(corner, kind), torch.tensor(expected))
        torch.testing.assert_close(enforced_presence(middle, kind), torch.tensor(expected))


def test_where_there_is_none_losses_and_gradients_are_finite():
    empty = torch.zeros(2, 3, 4, 4, requires_grad=True)
    losses = [presence(empty, "tanh"), *(enforced_presence(empty[:, 0], kind) for kind in ("edges", "log")), pixel_entropy(empty),
              concentration(empty), orthogonality(empty.flatten(2)), equivariance(empty, empty, 0, (0, 0), 1, (8, 8))]
    assert all(torch.autograd.grad(loss, empty, retain_graph=True)[0].isfinite().all() and loss.isfinite() for loss in losses)


def test_variation_counts_what_neighbours_differ_by():
    halves = one_hot([[0, 0, 1], [0, 0, 1]])
    torch.testing.assert_close(total_variation(halves), torch.tensor(2 * 2 / 6))
    assert total_variation(torch.ones(1, 2, 3, 3)) == 0
    torch.testing.assert_close(total_variation(halves.expand(4, -1, -1, -1)), torch.tensor(2 * 2 / 6))


def test_entropy_is_none_where_patches_are_decided_and_most_where_they_are_not():
    assert pixel_entropy(one_hot([[0, 1], [2, 0]])) == 0
    torch.testing.assert_close(pixel_entropy(torch.full((2, 4, 3, 3), 0.25)), torch.tensor(math.log(4)))


def test_orthogonality_of_directions():
    assert orthogonality(3 * torch.eye(4)[None]) == 0
    torch.testing.assert_close(orthogonality(torch.ones(2, 3, 4)), torch.tensor(6 / 9))


def test_concentration_of_a_point_and_of_two():
    points = torch.zeros(1, 1, 4, 8)
    points[0, 0, 1, 2] = 1
    assert concentration(points) == 0
    points[0, 0, 1, 6] = 1
    torch.testing.assert_close(concentration(points), torch.tensor(2 * (2 / 4) ** 2 / 32))  # columns by the height
    down = torch.zeros(1, 1, 4, 8)
    down[0, 0, [0, 2], 3] = 1
    torch.testing.assert_close(concentration(down), torch.tensor(2 * (1 / 8) ** 2 / 32))  # rows by the width


@pytest.mark.parametrize(("angle", "translate", "scale"), [(0, (0, 0), 1.0), (90, (0, 0), 1.0), (0, (16, -8), 1.0), (-90, (8, 0), 1.0)])
def test_maps_that_go_where_the_image_goes_are_equivariant(angle, translate, scale):
    """Shifted and turned as the image is, of pixels four times as fine, they come back to where they were."""
    inside = torch.zeros(1, 2, 15, 15)
    inside[0, 0, 5:8, 6:9] = inside[0, 1, 7:10, 4:9] = 1
    moved = affine(inside, angle, [n // 4 for n in translate], scale, [0.0])
    assert equivariance(inside, moved, angle, translate, scale, (60, 60)).abs() < 1e-6
    other = equivariance(inside, inside, angle, translate, scale, (60, 60))
    assert (other > 0.1) == (moved - inside).any()


def test_gradients_by_differences():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def losses(x):
        m = x.softmax(1)
        return torch.stack([
            presence(m), presence(m, "tanh"), enforced_presence(m[:, -1]), enforced_presence(m[:, -1], "log"), total_variation(m),
            pixel_entropy(m), orthogonality(m.flatten(2)), equivariance(m, m.square(), 30, (3, -2), 1.2, (20, 20))])

    assert torch.autograd.gradcheck(losses, x)


def test_maps_of_one_patch_and_half_precision():
    for kind in ("original", "soft_constraint", "tanh", "soft_tanh"):
        assert presence(maps(1, 2, 1, 1), kind).isfinite() and presence(maps(1, 2, 2, 4), kind).isfinite()
    assert enforced_presence(maps(1, 2, 1, 1)[:, 0]).isfinite()
    half = maps().bfloat16()
    for found in (presence(half), enforced_presence(half[:, 0]), total_variation(half), pixel_entropy(half), orthogonality(half.flatten(2)),
                  concentration(half), equivariance(half, half, 10, (1, 1), 1.1, (12, 10))):
        assert found.dtype == torch.float32 and found.isfinite()


@pytest.mark.parametrize("mask", ["hard", "straight_through", "soft"])
def test_the_losses_of_a_network_train_all_of_it_and_leave_nothing_in_it(mask):
    model, (images, labels) = network(mask=mask).train(), batch()
    logits, loss, terms = zoo.PartDiscoveryLoss()(model, images, labels)
    assert logits.shape == (3, 5) and set(terms) == set(part_losses.WEIGHTS) - {"concentration"} and model.take_parts is None
    torch.testing.assert_close(loss, sum(part_losses.WEIGHTS[name] * term for name, term in terms.items()))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_terms_are_of_the_pass_that_gave_the_logits():
    model, (images, labels) = network().eval(), batch()
    chosen = dict(equivariance=0, presence=0, enforced_presence=0, concentration=2)
    logits, loss, terms = zoo.PartDiscoveryLoss(chosen)(torch.nn.Sequential(model), images, labels)
    parts, of_parts = model.discover(images)
    torch.testing.assert_close(logits, model(images))
    expected = dict(
        stage_2=torch.nn.functional.cross_entropy(logits, labels), stage_1=torch.nn.functional.cross_entropy(of_parts, labels),
        total_variation=total_variation(parts.maps), entropy=pixel_entropy(parts.maps), orthogonality=orthogonality(parts.features),
        concentration=concentration(parts.maps[:, :-1]))
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(loss, sum(terms.values()) + terms["concentration"])


def test_a_compiled_network():
    model, (images, labels) = network().eval(), batch()
    chosen = zoo.PartDiscoveryLoss(dict(equivariance=0))
    _, expected, _ = chosen(model, images, labels)
    _, loss, _ = chosen(torch.compile(model, fullgraph=True, backend="aot_eager"), images, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_pass_under_autocast():
    images, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        _, loss, _ = zoo.PartDiscoveryLoss(presence="tanh")(network().train(), images, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: presence(maps(), "soft"), "presence is one of original, soft_constraint, tanh, soft_tanh, got 'soft'; did you mean soft_"),
    (lambda: enforced_presence(maps()[:, 0], "edge"), "one of edges, log, linear, mse, got 'edge'; did you mean edges"),
    (lambda: enforced_presence(maps()), r"of the background's map \(B, H, W\), got shape \(2, 3, 6, 5\)"),
    (lambda: total_variation(maps()[0]), r"total variation is of maps \(B, parts, H, W\), got shape \(3, 6, 5\)"),
    (lambda: pixel_entropy(torch.zeros(0, 3, 4, 4)), "entropy is of maps"),
    (lambda: orthogonality(maps()), r"orthogonality is of features \(B, parts, C\), got shape \(2, 3, 6, 5\)"),
    (lambda: equivariance(maps(), maps()[:1], 0, (0, 0), 1, (8, 8)), "equivariance is of maps of one shape"),
    (lambda: zoo.PartDiscoveryLoss(dict(entropie=1)), "there is no term 'entropie'; did you mean entropy"),
    (lambda: zoo.PartDiscoveryLoss(presence="edges"), "here one of original, soft_constraint, tanh, soft_tanh, got 'edges'"),
    (lambda: zoo.PartDiscoveryLoss()(timm.create_model("test_vit"), *batch()), "holds, 0 networks that discover parts"),
    (lambda: zoo.PartDiscoveryLoss()(torch.nn.ModuleList([network(), network()]), *batch()), "holds, 2 networks that discover parts"),
])
def test_what_cannot_be_is_one_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call()
