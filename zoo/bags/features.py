"""Features of the pictures of bags, computed once by a frozen network and kept in files."""
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import timm.data
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.files import make_folder, replacing
from zoo.probing.tokens import digest_of_weights
from zoo.reading.bags import Bag, read_features
from zoo.reading.pictures import open_picture

READERS = 4  # pictures that are read at once
ORIGIN = "origin"  # under which a file records what its features depend on

Features = Callable[[Bag], Tensor]


class CachedFeatures:
    """A bag's features (N, D), float32, in the order of its pictures: from a file in `folder`, or computed and written there.

    A file that depends on anything else than now, the network and its weights, what is done to pictures, their names, sizes and times, is
    written anew. Of pictures, `batch` are in memory at once, of features one bag's.

    Raises InputError for a network whose answer is no (B, D), pictures that cannot be read, features that are not finite.
    """

    def __init__(self, network: nn.Module, info: ModelInfo, folder: str | Path, batch: int = 32):
        self.network, self.folder, self.batch = network.eval(), Path(folder), batch
        self.parameter = next(network.parameters())
        self.channels = info.input_size[0]
        self.transform = cast(Callable[[Image.Image], Tensor], timm.data.create_transform(**info.data_config, is_training=False))
        config = json.dumps(info.data_config, sort_keys=True, default=str)
        self.depends = f"{info.name} {digest_of_weights(network)} {config}"
        make_folder(self.folder)

    def __call__(self, bag: Bag) -> Tensor:
        stamps = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in bag.files]
        origin = hashlib.sha256(json.dumps([self.depends, stamps]).encode()).hexdigest()
        place = hashlib.sha256(str(bag.files[0].absolute()).encode()).hexdigest()[:12]
        path = self.folder / f"{bag.name}-{place}.safetensors"  # bags of two classes may have one name
        if _origin(path) != origin:
            features = self._compute(bag)
            with replacing(path) as written:
                written.write_bytes(save({"features": features}, {ORIGIN: origin}))
        return load_file(path)["features"]

    def _compute(self, bag: Bag) -> Tensor:
        found = []
        with ThreadPoolExecutor(READERS) as readers, torch.inference_mode():
            for start in range(0, len(bag.files), self.batch):
                images = torch.stack(list(readers.map(self._read, bag.files[start : start + self.batch])))
                features = self.network(images.to(self.parameter.device, self.parameter.dtype))
                if not isinstance(features, Tensor) or features.ndim != 2:
                    raise InputError(f"{type(self.network).__name__} gives no features (B, D) of pictures")
                found.append(features.float().cpu())
        features = torch.cat(found)
        if not features.isfinite().all():
            raise InputError(f"{type(self.network).__name__} gives features of the bag {bag.name} that are not finite numbers")
        return features

    def _read(self, path: Path) -> Tensor:
        return self.transform(open_picture(path, self.channels))


def of_files(bag: Bag) -> Tensor:
    """The features of a bag that is a file of them."""
    return read_features(bag.files[0])


def _origin(path: Path) -> Any:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(ORIGIN)
    except (FileNotFoundError, SafetensorError):
        return None

