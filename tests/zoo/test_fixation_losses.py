"""Losses and metrics of fixation prediction: the authors' numbers, what is known of right and wrong maps, and shapes."""
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.errors import InputError
from zoo.fixations import correlation, divergence, scanpath, similarity
from zoo.measuring.fixations import auc_judd, measured

GOLDEN = Path(__file__).parents[1] / "golden"


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5):
    assert (ours - theirs).abs().max() <= bound * (1 + theirs.abs().max())


def maps(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    p, y = torch.rand(*shape, generator=random), torch.rand(*shape, generator=random) ** 4
    return p, y, (torch.rand(*shape, generator=random) > 0.9).float()


def test_sums_numbers():
    vector = load_file(GOLDEN / "sum" / "losses.safetensors")
    p, y, f = vector["prediction"].requires_grad_(), vector["saliency"], vector["fixations"]
    found = dict(kl=divergence(p, y).mean(), cc=correlation(p, y).mean(), sim=similarity(p, y).mean(), nss=scanpath(p, f).mean(),
                 loss=zoo.FixationLoss()(p, y, f))
    for name, value in found.items():
        close(value, vector[name])
    sum((value * vector[f"cotangent/{name}"]).sum() for name, value in found.items()).backward()
    close(p.grad, vector["grad/prediction"], 1e-4)


def test_msinets_numbers():
    vector = load_file(GOLDEN / "msinet" / "kld.safetensors")
    p = vector["prediction"].requires_grad_()
    loss = zoo.FixationDivergenceLoss()(p, vector["target"])
    close(loss, vector["loss"])
    loss.backward()
    close(p.grad, vector["grad/prediction"], 1e-4)


def test_sums_auc():
    vector = load_file(GOLDEN / "sum" / "auc_judd.safetensors")
    found = [auc_judd(p[0], f[0]) for p, f in zip(vector["prediction"], vector["fixations"], strict=True)]
    close(torch.tensor(found), vector["auc"])


def test_auc_is_the_area_by_its_definition():
    """Thresholds one after the other, counted out; fixated pixels that share a value count as the definition has it."""
    random = np.random.default_rng(0)
    for levels in (1000, 6):
        p, f = random.integers(levels, size=(12, 15)) / levels, random.random((12, 15)) > 0.9
        n, size = f.sum(), f.size
        hits, alarms = [0.0], [0.0]
        for k, threshold in enumerate(sorted(p[f], reverse=True)):
            hits.append((k + 1) / n)
            alarms.append(((p >= threshold).sum() - k - 1) / (size - n))
        expected = np.trapezoid([*hits, 1], [*alarms, 1])
        assert abs(auc_judd(torch.from_numpy(p), torch.from_numpy(f)) - expected) < 1e-12


def test_the_right_map_is_the_best():
    p, y, f = maps(2, 1, 20, 30)
    assert divergence(y, y).abs().max() < 1e-5 < divergence(p, y).min()
    assert torch.allclose(correlation(y, y), torch.ones(2)) and torch.allclose(correlation(-y, y), -torch.ones(2))
    assert torch.allclose(similarity(3 * y + 1, y), torch.ones(2)) and (similarity(p, y) < 1).all()
    assert (scanpath(f, f) > scanpath(p + f, f)).all() and torch.allclose(scanpath(5 * p + 2, f), scanpath(p, f), atol=1e-5)
    assert measured(y[0, 0], y[0, 0], y[0, 0] > 0.5)["auc"] > 0.99
    assert zoo.FixationLoss()(y, y, f) < zoo.FixationLoss()(p, y, f)


def test_every_picture_counts_by_itself_and_shapes_are_free():
    p, y, f = maps(3, 1, 7, 5)
    for function, other in ((divergence, y), (correlation, y), (similarity, y), (scanpath, f)):
        found = function(p, other)
        assert found.shape == (3,)
        close(function(p[1:2], other[1:2]), found[1:2])
        close(function(p[:, 0], other[:, 0]), found)
        close(function(p.mT.contiguous().mT, other), found)
        assert function(p.half(), other.half()).dtype == torch.float32 and function(p.double(), other).dtype == torch.float64


def test_gradients():
    p, y, f = (m.double() for m in maps(2, 1, 4, 3))
    p.requires_grad_()
    for loss in (zoo.FixationLoss(), zoo.FixationDivergenceLoss()):
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, y, f), p)
    assert torch.isclose(zoo.FixationLoss()(p, y) - zoo.FixationLoss(nss=1)(p, y, f), scanpath(p, f).mean())


def test_maps_that_are_the_same_everywhere_give_numbers_and_gradients():
    y, f = maps(1, 1, 6, 6)[1:]
    for value in (0.0, 1.0):
        p = torch.full((1, 1, 6, 6), value, requires_grad=True)
        loss = zoo.FixationLoss()(p, y, f) + zoo.FixationDivergenceLoss()(p, y)
        loss.backward()
        assert loss.isfinite() and p.grad.isfinite().all()
        assert correlation(p, y) == 0 and scanpath(p, f) == 0 and similarity(p, y) == 0
    assert scanpath(y, torch.zeros_like(f)) == 0
    assert set(measured(y[0, 0], y[0, 0], torch.zeros(6, 6))) == set(measured(y[0, 0], y[0, 0])) == {"kl", "cc", "sim"}


def test_compiled_whole():
    p, y, f = maps(2, 1, 8, 9)
    for loss in (zoo.FixationLoss(), zoo.FixationDivergenceLoss()):
        close(torch.compile(loss, fullgraph=True, backend="aot_eager")(p, y, f), loss(p, y, f))
    torch._dynamo.reset()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: divergence(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5)), r"fixations is of shape \(1, 1, 4, 5\), .* \(1, 1, 4, 4\)"),
    (lambda: zoo.FixationDivergenceLoss(0), "eps must be above 0, got 0"),
    (lambda: auc_judd(torch.zeros(4, 4), torch.zeros(4, 5)), r"fixations are of shape \(4, 5\)"),
    (lambda: auc_judd(torch.zeros(4, 4), torch.zeros(4, 4)), "0 of 16 pixels are fixated"),
    (lambda: auc_judd(torch.zeros(4, 4), torch.ones(4, 4)), "16 of 16 pixels are fixated"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
