import numpy as np
import pytest
import torch
from torch import nn

from zoo.errors import InputError
from zoo.predicting import sliding_windows
from zoo.predicting.sliding_windows import segment


class Scores(nn.Module):
    """Logits that depend on the window: a convolution."""

    def __init__(self, dims, classes):
        super().__init__()
        torch.manual_seed(0)
        self.conv = (nn.Conv2d, nn.Conv3d)[dims - 2](1, classes, 5, padding=2)
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.conv(x)


@pytest.mark.parametrize(("size", "window"), [((9, 7), (4, 5)), ((4, 5), (4, 5)), ((11, 6, 5), (4, 3, 5)), ((7, 7, 7), (3, 3, 3))], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_windows_against_a_loop(size, window, overlap):
    model, x = Scores(len(size), 4), torch.randn(1, *size)
    seen = []
    found = segment(model, x, window, classes=4, overlap=overlap, batch=3, progress=lambda done, total: seen.append((done, total)))
    sums = torch.zeros(4, *size)
    starts = [sorted({min(s, n - w) for s in range(0, n, max(1, int(w * (1 - overlap))))}) for n, w in zip(size, window, strict=True)]
    count = 0
    for place in np.ndindex(*map(len, starts)):
        cut = tuple(slice(s[i], s[i] + w) for s, i, w in zip(starts, place, window, strict=True))
        weights = torch.ones(window)
        for axis, w in enumerate(window):
            profile = torch.tensor([np.exp(-0.5 * ((i - (w - 1) / 2) / (0.125 * w)) ** 2) for i in range(w)], dtype=torch.float32)
            weights = weights * profile.view(*[-1 if a == axis else 1 for a in range(len(window))])
        with torch.no_grad():
            sums[(slice(None), *cut)] += model(x[(slice(None), *cut)][None])[0] * weights.clamp(min=1e-3)
        count += 1
    assert found.dtype == torch.uint8 and torch.equal(found, sums.argmax(0).to(torch.uint8))
    assert seen[-1] == (count, count) and [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_memory_is_that_of_a_row_of_windows(monkeypatch):
    """What is kept of the scores does not grow with the first axis."""
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(sliding_windows.torch, "zeros", lambda *shape: made.append(shape) or zeros(*shape))
    for length in (8, 64):
        segment(Scores(3, 5), torch.randn(1, length, 6, 6), (4, 4, 4), classes=5)
    assert set(made) == {(5, 4, 6, 6), ((4, 6, 6),)}  # sums, and what their weights add up to


@pytest.mark.parametrize(("size", "window", "overlap", "message"), [
    ((8, 8), (4, 4, 4), 0.25, "the model takes 3-D input, and this is 2-D, of size 8×8"),
    ((8, 8, 8), (4, 4, 4), 1.0, "overlap is 1; it has to be at least 0 and below 1"),
])
def test_windows_that_do_not_fit(size, window, overlap, message):
    with pytest.raises(InputError, match=message):
        segment(Scores(3, 2), torch.zeros(1, *size), window, classes=2, overlap=overlap)


@pytest.mark.parametrize(("size", "window"), [((3, 9), (6, 5)), ((9, 2), (4, 5)), ((5, 3, 2), (4, 8, 5)), ((1, 1, 1), (3, 4, 5))], ids=str)
def test_what_is_smaller_than_the_window_is_padded_as_monai_does(size, window):
    from monai.inferers import sliding_window_inference

    model, x = Scores(len(size), 4), torch.randn(1, *size)
    with torch.no_grad():
        expected = sliding_window_inference(x[None], window, 4, model, overlap=0.5, mode="gaussian")[0].argmax(0)
    found = segment(model, x, window, classes=4, overlap=0.5)
    assert found.shape == size and (found != expected).sum() <= 1  # where rounding decides


def test_labels_of_many_classes_do_not_wrap():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            logits = torch.zeros(len(x), 400, *x.shape[2:])
            logits[:, 300] = 1
            return logits

    assert (segment(Three(), torch.randn(1, 6, 6), (4, 4), classes=400) == 300).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_one_sentence(value):
    model = Scores(2, 3)
    model.conv.bias.data[1] = value
    with pytest.raises(InputError, match="what the network gives is not finite: its weights, or the input"):
        segment(model, torch.randn(1, 6, 6), (4, 4), classes=3)
