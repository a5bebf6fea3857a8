"""Pictures of what a network's attention gates let through."""
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.files import check_writable, replacing
from zoo.layers import AttentionGate, capture
from zoo.layers._spatial import crop, resize
from zoo.models.dconnnet import SpaceBlock
from zoo.predicting.segmentation import prepare
from zoo.predicting.sheets import annotate, contact_sheet
from zoo.seeing.figures import grey
from zoo.seeing.page import Seen

GATES = (AttentionGate, SpaceBlock)  # what reports as `attention` how much of a map it lets through


def picture_gates(model: nn.Module, info: ModelInfo, path: str | Path, output: str | Path, *, slice_index: int | None = None) -> int:
    """Writes a sheet with what `see_gates` shows; returns how many gates there are."""
    check_writable(output)
    seen = see_gates(model, info, path, slice_index=slice_index)
    with replacing(output) as written:
        contact_sheet([annotate(shown.picture, [shown.title, shown.caption]) for shown in seen]).save(written)
    return len(seen) - 1


def see_gates(model: nn.Module, info: ModelInfo, path: str | Path, *, slice_index: int | None = None) -> list[Seen]:
    """The image and, for every gate of the U-Net or DconnNet `model`, its map over the image.

    Of a volume, they show the axial slice `slice_index` of the prepared volume (see `zoo.reading.volumes.Grid`; default: the middle
    one), and the network sees as many slices around it as its window has. Raises InputError if nothing can be shown.
    """
    x, at = prepare(info, Path(path)), None
    what = f"{x.shape[1]} x {x.shape[2]} pixels"
    if x.ndim == 4:
        at = x.shape[3] // 2 if slice_index is None else slice_index
        if not 0 <= at < x.shape[3]:
            raise InputError(f"slice {at} is not in {path}, which has slices 0 to {x.shape[3] - 1}")
        what = f"slice {at} of {x.shape[3]}"
        first = min(max(0, at - info.input_size[3] // 2), max(0, x.shape[3] - info.input_size[3]))
        x, at = x[..., first:first + info.input_size[3]], at - first
    elif slice_index is not None:
        raise InputError(f"slice {slice_index} is asked for, but {path} is a picture")
    modules = dict(model.named_modules())
    if not any(isinstance(module, GATES) for module in modules.values()):
        raise InputError(f"{info.name} has no attention gates to show")
    with capture(model) as maps, torch.inference_mode():
        model(x[None])
    gates = {name: reported["attention"][0] for name, reported in maps.items() if isinstance(modules[name], GATES)}
    reduction = cast(int, model.reduction)
    padded = [-(-n // reduction) * reduction for n in x.shape[1:]]
    image = _shown(x[:1], at)
    seen = [Seen("image", Path(path).name, what, grey(image))]
    for name, gate in gates.items():
        whole = crop(resize(gate[None], padded), x.shape[1:])[0]
        size, shares = " x ".join(map(str, gate.shape[1:])), f"{gate.min():.2f} to {gate.max():.2f}, mean {gate.mean():.2f}"
        caption = f"what it lets through, {shares}; {size}"
        seen.append(Seen(name.replace(".", "-"), name, caption, _heat(image, _shown(whole, at)), ("gates",)))
    return seen


def _shown(x: Tensor, at: int | None) -> np.ndarray:
    """(1, H, W) or a slice of (1, X, Y, Z), the latter with the front up: an image (height, width)."""
    return x[0].numpy() if at is None else np.rot90(x[0, ..., at].numpy())


def _heat(image: np.ndarray, gate: np.ndarray) -> Image.Image:
    """The image in grey under the map, from black (its least) over red and yellow to white (its greatest)."""
    low, high = gate.min(), gate.max()
    level = 3 * (gate - low) / max(high - low, 1e-8)
    heat = 255 * np.stack([(level - i).clip(0, 1) for i in range(3)], -1)
    under = np.asarray(grey(image), np.float32)[..., None]
    return Image.fromarray((0.4 * under + 0.6 * heat).astype(np.uint8))
