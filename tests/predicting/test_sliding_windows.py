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
    assert set(made) == {(5, 4, 6, 6)}


@pytest.mark.parametrize(("size", "window", "overlap", "message"), [
    ((8, 8), (4, 4, 4), 0.25, "the model takes 3-D input, and this is 2-D, of size 8×8"),
    ((8, 8, 3), (4, 4, 4), 0.25, "the input has 8×8×3 positions, fewer than the window of 4×4×4; choose a smaller window"),
    ((8, 8, 8), (4, 4, 4), 1.0, "overlap is 1; it has to be at least 0 and below 1"),
])
def test_windows_that_do_not_fit(size, window, overlap, message):
    with pytest.raises(InputError, match=message):
        segment(Scores(3, 2), torch.zeros(1, *size), window, classes=2, overlap=overlap)
