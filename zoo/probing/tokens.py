"""Tokens of a frozen network for all pictures of some data, computed once and kept in files."""
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm.data
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.files import make_folder, replacing
from zoo.probe import patches_and_class_token, probe
from zoo.reading.own_data import OwnData, Sample
from zoo.reading.pictures import open_picture

SHARD_BYTES = 64 << 20  # of tokens in float32, which is about what is held in memory while they are computed
HALF_ERROR = 1e-3  # of float16, relative, above which tokens are beyond its range
READERS = 4  # pictures that are read at once
ORIGIN = "origin"  # under which a file records what its tokens depend on
SHOWN = ("model", "norm")  # of that, what can be read
PARTS = ("train", "val")

Progress = Callable[[str, int, int], None]
Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Tokens:
    """Of every picture of a part of the data: `tokens` (N, D), their `mean` (1, D), the `class_token` (1, D) where there is one, a label.

    All but the labels stay in the files, from which `rows` reads.
    """

    files: tuple[Any, ...]
    rows_per_file: int
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """D."""
        return self.files[0].get_slice("mean").get_shape()[-1]

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """What is called `name` of some pictures, float32, in their order."""
        return torch.stack([self.files[i // self.rows_per_file].get_slice(name)[i % self.rows_per_file].float() for i in indices])


def cached_tokens(network: nn.Module, info: ModelInfo, data: OwnData, folder: str | Path, *, norm: bool = True, batch: int = 32,
                  progress: Progress = lambda part, done, pictures: None) -> dict[str, Tokens]:
    """The tokens of the parts "train" and "val" of `data`, from the files in `folder` where they are there, else computed and written.

    A file is there whole or not at all, so that what was interrupted goes on where it stopped. Tokens are kept in float16, or, in a
    file with one beyond its range, float32. Every file records what its tokens depend on: the network and its weights, what is done
    to pictures before it, and the pictures' names, sizes and times.

    Args:
        network, norm: as `zoo.probe` takes them. It computes where its parameters are.
        info: what it expects of pictures.
        batch: pictures that it is given at once.
        progress: is called with the part, and how many of its pictures are done.

    Raises InputError for data without classes, pictures that cannot be read, and files in `folder` that depend on anything else.
    """
    if data.task != "classes":
        raise InputError(f"{data.root} holds {data.form}, and heads learn classes of whole pictures: class folders, or a CSV of paths and "
                         "labels, are needed")
    folder = Path(folder)
    origin = _origin(network, info, data, norm)
    _check_origin(folder, origin)
    make_folder(folder)
    compute = _Computing(network, info, norm, batch)
    found = {}
    for part in PARTS:
        samples = data.splits[part]
        rows = max(1, SHARD_BYTES // (4 * compute(samples[:1])["tokens"].numel()))
        paths = []
        for start in range(0, len(samples), rows):
            chosen = samples[start : start + rows]
            paths.append(folder / f"{part}-{len(paths):05d}.safetensors")
            if not _is_whole(paths[-1], len(chosen)):
                computed = compute(chosen, lambda done, start=start: progress(part, start + done, len(samples)))  # noqa: B023  called in this turn
                with replacing(paths[-1]) as written:
                    written.write_bytes(save(computed, {ORIGIN: json.dumps(origin)}))
        found[part] = Tokens(tuple(safe_open(path, "pt") for path in paths), rows, torch.tensor([sample.labels[0] for sample in samples]))
    return found


class _Computing:
    def __init__(self, network: nn.Module, info: ModelInfo, norm: bool, batch: int):
        self.probe = probe(network, 1, pooling="linear", norm=norm)
        self.parameter = next(network.parameters())
        self.transform = cast(Transform, timm.data.create_transform(**info.data_config, is_training=False))
        self.channels, self.batch = info.input_size[0], batch

    def __call__(self, samples: Sequence[Sample], progress: Callable[[int], None] = lambda done: None) -> dict[str, Tensor]:
        """What a file holds of these pictures."""
        batches = []
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(samples), self.batch):
                images = torch.stack(list(readers.map(self._read, samples[start : start + self.batch])))
                batches.append(self._of(images.to(self.parameter.device, self.parameter.dtype)))
                progress(min(start + self.batch, len(samples)))
        return {name: _stored(torch.cat([batch[name] for batch in batches])) for name in batches[0]}

    def _read(self, sample: Sample) -> Tensor:
        return self.transform(open_picture(sample.path, self.channels))

    def _of(self, images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            patches, class_token = patches_and_class_token(self.probe.backbone, self.probe.forward_features(images))
            found = {"tokens": patches, "mean": patches.mean(1, keepdim=True)}
            if class_token is not None:
                found["class_token"] = class_token
            if not patches.isfinite().all():
                raise InputError("the network gives tokens that are not finite numbers (NaN or infinity)")
            return {name: value.float().cpu() for name, value in found.items()}


def _stored(values: Tensor) -> Tensor:
    half = values.half()
    return (half if (values - half).norm() <= HALF_ERROR * values.norm() else values).contiguous()


def digest_of_weights(network: nn.Module) -> str:
    """The same for the same names, dtypes, shapes and numbers."""
    weights = hashlib.sha256()
    for name, value in network.state_dict().items():
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return weights.hexdigest()


def _origin(network: nn.Module, info: ModelInfo, data: OwnData, norm: bool) -> dict[str, str]:
    """What tokens depend on, by what it is called. Times of files stand for their contents."""
    pictures = hashlib.sha256()
    for part in PARTS:
        for sample in data.splits[part]:
            status = sample.path.stat()
            place = sample.path.relative_to(data.root) if sample.path.is_relative_to(data.root) else sample.path
            pictures.update(f"{part} {place} {sample.labels[0]} {status.st_size} {status.st_mtime_ns}\n".encode())
    config = json.dumps(info.data_config, sort_keys=True, default=str)
    return {"model": info.name, "weights": digest_of_weights(network), "preparation of pictures": config,
            "norm": "after the last norm" if norm else "before the last norm", "data": pictures.hexdigest()}


def _check_origin(folder: Path, origin: dict[str, str]) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        if (recorded := _recorded(path)) and recorded != origin:
            differing = [f"{what} ({recorded[what]}, now {value})" if what in recorded and what in SHOWN else what
                         for what, value in origin.items() if recorded.get(what) != value]
            raise InputError(f"{folder} holds tokens for which something was different: {', '.join(differing)}; give another --work-dir, "
                             "or delete that folder")


def _recorded(path: Path) -> dict[str, str]:
    """What the file says that its tokens depend on; nothing if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(ORIGIN, '{"of somebody else": ""}'))
    except SafetensorError:
        return {}


def _is_whole(path: Path, rows: int) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("tokens").get_shape()[0] == rows
    except (FileNotFoundError, SafetensorError):
        return False
