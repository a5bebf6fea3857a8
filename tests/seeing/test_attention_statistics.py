"""Statistics of attention, against the authors' numbers and their definitions."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.seeing import attention_statistics as statistics
from zoo.seeing.attention_statistics import Grid

VECTOR = load_file(Path(__file__).parents[1] / "golden" / "attention_statistics" / "metrics.safetensors")
GRID = Grid(1, 4, 4)


@pytest.mark.parametrize("name", sorted(set(VECTOR) - {"attention"}))
def test_those_of_the_authors(name):
    attention = VECTOR["attention"].double()
    if name.startswith("on_token_"):
        found = statistics.on_tokens(attention, GRID, name.removeprefix("on_token_"))
    elif name.startswith("offset_"):
        found = getattr(statistics.offset(attention, GRID), name.removeprefix("offset_"))
    else:
        found = getattr(statistics, name)(attention, GRID)
    if name == "aligned":
        found = found * len(attention)  # theirs is the sum over images
    torch.testing.assert_close(found, VECTOR[name].double(), atol=1e-5, rtol=1e-5)
