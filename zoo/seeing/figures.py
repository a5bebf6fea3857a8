"""What pictures of a model are drawn with: numbers in grey, and matplotlib (`pip install "zoo-attention[visualize]"`)."""
import io
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from zoo.errors import require

HEAT: dict[str, Any] = dict(cmap="inferno", alpha=0.6, interpolation="bilinear")  # of maps over an image

def grey(values: np.ndarray) -> Image.Image:
    """Numbers (H, W) as a picture: the lowest hundredth black, the highest white."""
    low, high = np.percentile(values, (1, 99))
    return Image.fromarray((255 * ((values - low) / max(high - low, 1e-8)).clip(0, 1)).astype(np.uint8))


def new_figure(count: int, rows: int = 1):
    """A figure with so many axes side by side, in so many rows, and the axes."""
    require("seeing", "visualize", "matplotlib")
    from matplotlib.figure import Figure
    side = 4.5 if count < 3 else 2.5
    figure = Figure(figsize=(side * count, side * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, count, squeeze=False).flatten()
    for each in axes:
        each.set_axis_off()
    return figure, axes


def overlay(axes, image: np.ndarray, heat: Tensor, extent: tuple[float, ...]) -> None:
    """The image (H, W, 3) under the map `heat` (h, w), both stretched over `extent`, and a bar of the map's numbers."""
    axes.imshow(image, extent=extent)
    drawn = axes.imshow(heat.float().cpu().numpy(), extent=extent, **HEAT)
    axes.figure.colorbar(drawn, ax=axes, shrink=0.8)


def rectangle(box: tuple[int, int, int, int], **style):
    """Around the positions that begin at a row and a column, so many rows and columns."""
    from matplotlib.patches import Rectangle
    row, column, height, width = box
    return Rectangle((column - 0.5, row - 0.5), width, height, **style)


def render(figure) -> Image.Image:
    """The figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
