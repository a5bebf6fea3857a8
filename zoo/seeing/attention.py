"""The attention of all heads of a network, and numbers of it: a table, and the page that `zoo visualize --attention` writes."""
import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.losses import fused
from zoo.modules import WatchingAttention
from zoo.seeing import attention_statistics as statistics
from zoo.seeing.attention_statistics import Grid
from zoo.seeing.attributions import grid_of_tokens, undisturbed

NUMBERS = {  # of every head, with what they say
    "distance": "mean distance of what is attended to, of a picture whose sides are 1",
    "position_deviation": "how much attention depends on the place that asks",
    "head_deviation": "how much the heads of the layer differ",
    "on_prefix": "share of attention that patches give to class and register tokens",
    "offset_distance": "how far from the asking place the centre of attention lies, of half the map of moves",
    "offset_x": "the same to the right", "offset_y": "the same downwards",
}


class Layer(NamedTuple):
    """Attention between all tokens of one picture, (heads, T, T)."""

    attention: Tensor
    grid: Grid


def collect(model: nn.Module, image: Tensor) -> list[Layer]:
    """The layers in which all tokens of the picture attend to one another, as they run: of any timm vision transformer, of FAN, of
    BiFormer's last stage. Not windows, and not the attention of a class token alone.

    Args:
        image: (1, C, H, W).

    Raises:
        InputError: a network without such a layer.
    """
    found: list[Layer] = []
    with undisturbed(model), torch.no_grad(), fused(model), _Attention(model, (image.shape[2], image.shape[3]), found):
        model(image)
    if not found:
        raise InputError(f"{type(model).__name__} has no layer in which all tokens of a picture attend to one another")
    return found


class _Attention(WatchingAttention):
    def __init__(self, model: nn.Module, size: tuple[int, int], found: list[Layer]):
        super().__init__()
        self.model, self.size, self.found = model, size, found

    def watch(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> None:
        if query.ndim != 4 or query.shape != key.shape or len(query) != 1 or is_causal:
            return
        grid = grid_of_tokens(self.model, query[:, 0], self.size)
        if grid is None:
            return
        logits = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        self.found.append(Layer(logits.softmax(-1)[0].cpu(), Grid(*grid)))


def numbers(layers: Sequence[Layer]) -> list[list[dict[str, float]]]:
    """`NUMBERS` of every head of every layer; NaN where one token or head has no deviation."""
    found = []
    for attention, grid in layers:
        one = attention[None, None].double()
        offset = statistics.offset(one, grid)
        columns = {
            "distance": statistics.distance(one, grid)[0, 0], "position_deviation": statistics.position_deviation(one, grid)[0, 0],
            "head_deviation": statistics.head_deviation(one, grid)[0].expand(len(attention)),
            "on_prefix": statistics.on_tokens(one, grid, "spc")[0, :, : grid.prefix].sum(-1),
            "offset_distance": offset.distance[0], "offset_x": offset.x[0], "offset_y": offset.y[0],
        }
        found.append([dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)])
    return found


def table(pictures: Sequence[tuple[str, list[list[dict[str, float]]]]]) -> str:
    """`numbers` of pictures by their names, as comma-separated values: a row for every head; what is not a number is empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", "layer", "head", *NUMBERS])
    for name, layers in pictures:
        for i, heads in enumerate(layers):
            for j, row in enumerate(heads):
                writer.writerow([name, i + 1, j + 1, *(f"{row[key]:.6g}" if row[key] == row[key] else "" for key in NUMBERS)])
    return text.getvalue()
