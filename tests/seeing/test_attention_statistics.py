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


def looked_at(rows, columns, prefix=0, heads=2):
    """Attention of random logits, (images, layers, heads, T, T)."""
    tokens = prefix + rows * columns
    return torch.randn(3, 2, heads, tokens, tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).softmax(-1)


@pytest.mark.parametrize("grid", [Grid(0, 3, 5), Grid(2, 4, 2), Grid(1, 1, 6), Grid(1, 1, 1)])
def test_grids_that_are_not_square(grid):
    attention = looked_at(grid.rows, grid.columns, grid.prefix)
    spatial = attention[..., grid.prefix:, grid.prefix:]
    spatial = spatial / spatial.sum(-1, keepdim=True)
    places = [(i / max(grid.rows - 1, 1), j / max(grid.columns - 1, 1)) for i in range(grid.rows) for j in range(grid.columns)]
    expected = sum(spatial[..., a, b] * ((p[0] - q[0])**2 + (p[1] - q[1])**2)**0.5
                   for a, p in enumerate(places) for b, q in enumerate(places)) / len(places)
    torch.testing.assert_close(statistics.distance(attention, grid), torch.as_tensor(expected).expand(3, 2, 2))
    moves = statistics.aligned(attention, grid)
    assert moves.shape == (2, 2, 2 * grid.rows - 1, 2 * grid.columns - 1)
    torch.testing.assert_close(moves.sum((-2, -1)), torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(moves[..., grid.rows - 1, grid.columns - 1], spatial.diagonal(dim1=-2, dim2=-1).mean((0, -1)))


def test_a_head_that_looks_at_its_right_neighbour():
    rows, columns = 3, 4
    attention = torch.zeros(1, 1, 1, rows * columns, rows * columns)
    for i in range(rows):
        for j in range(columns - 1):
            attention[..., i * columns + j, i * columns + j + 1] = 1
    grid = Grid(0, rows, columns)
    offset = statistics.offset(attention, grid)
    assert offset.y == 0 and offset.x == pytest.approx(1 / (columns - 1)) and offset.distance == offset.x
    assert statistics.distance(attention, grid) == pytest.approx(1 / (columns - 1) * (columns - 1) / columns)  # rows of sum 0 stay 0


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"T = 1 \+ 2·3 = 7, got shape \(3, 2, 2, 6, 6\)"):
        statistics.distance(looked_at(2, 3), Grid(1, 2, 3))
    with pytest.raises(ValueError, match="queries must be all, cls, spc or spcpure, got 'class'"):
        statistics.on_tokens(looked_at(2, 3), Grid(0, 2, 3), "class")
