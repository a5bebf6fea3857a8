"""Checkpoints of classifiers without the attention, or the heads, that matter least on somebody's pictures."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.attention_removal import Choice, choose_blocks, remove_attention
from zoo.changes import Change
from zoo.checkpoints import MODEL_PREFIX, ModelInfo, check_downloadable, load_model, load_trained, opened
from zoo.errors import InputError, first_few
from zoo.files import replacing
from zoo.heads import head_importance, prune_heads
from zoo.reading.pictures import find_pictures, open_picture
from zoo.weights import load_weights

Progress = Callable[[int, int], None]


@dataclass
class Prunable:
    """A classifier, what is known about it, and what a checkpoint of it records."""

    model: nn.Module
    info: ModelInfo
    record: dict[str, Any]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class Pictures:
    """Pictures as batches of what a network sees, and their classes, −1 where the folder's name is none; read anew on every pass.

    Args:
        progress: called with the batches that have been read in this pass, and their number.
    """

    def __init__(self, folder: str | Path, info: ModelInfo, batch: int, progress: Progress = lambda done, all_: None):
        self.paths, self.info, self.batch, self.progress = find_pictures([folder]), info, batch, progress
        names = {name: place for place, name in enumerate(info.classes)}
        self.labels = [names.get(path.parent.name, -1) for path in self.paths]

    def labelled(self) -> "Pictures":
        """Those in folders named after classes. Raises InputError where there are none."""
        kept = [(path, label) for path, label in zip(self.paths, self.labels, strict=True) if label >= 0]
        if not kept:
            known = f"the classes are {first_few(self.info.classes)}" if self.info.classes else f"{self.info.name} has no names of classes"
            raise InputError(f"no picture is in a folder named after a class, by which its class would be known; {known}")
        self.paths, self.labels = [path for path, _ in kept], [label for _, label in kept]
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        see = cast(Callable[[Image.Image], Tensor], timm.data.create_transform(**self.info.data_config, is_training=False))
        for start in range(0, len(self.paths), self.batch):
            paths = self.paths[start : start + self.batch]
            yield (torch.stack([see(open_picture(path, self.info.input_size[0])) for path in paths]),
                   torch.tensor(self.labels[start : start + self.batch]))
            self.progress(start // self.batch + 1, -(-len(self.paths) // self.batch))


def load(name_or_path: str, weights: str | None = None, pretrained: bool = False) -> Prunable:
    """The classifier in a checkpoint of `zoo train`; or a registered one, with the weights of a file or those that timm downloads.

    Raises InputError for what those refuse, for both or none of them, and for networks that do not name classes.
    """
    if weights is None and not pretrained:
        checkpoint = opened(name_or_path)
        model, info = load_trained(checkpoint)
        record = {**(checkpoint.record or {}), "changes": list(info.changes)}
    elif weights is not None and pretrained:
        raise InputError("--weights and --pretrained both say whose weights are looked at; give one")
    elif not timm.is_model(name_or_path):
        raise InputError(f"--weights and --pretrained go with the name of a registered model, and {name_or_path} is none")
    else:
        if pretrained:
            check_downloadable(name_or_path)
        model, info = load_model(name_or_path, pretrained=pretrained)
        if weights is not None:
            load_weights(model, weights)
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in info.data_config.items()}
        record = {"task": info.task, "model": info.name, "model_args": {}, "classes": [], **config}
    if info.task != "classification":
        raise InputError(f"{info.name} names no classes of whole pictures, on which pruning is measured")
    return Prunable(model, info, record)


def prune_attention(network: Prunable, pictures: Pictures, count: int, at_once: bool) -> list[Choice]:
    """Takes the attention out of `count` blocks, in place, or gives them a share of all of it, which fades out when they are trained."""
    choices = choose_blocks(network.model, pictures, count)
    blocks = [choice.block for choice in choices]
    share = None if at_once else 1.0
    remove_attention(network.model, blocks, share)
    _record(network, {"type": "remove_attention", "blocks": blocks, "share": share})
    return choices


def prune_share_of_heads(network: Prunable, pictures: Pictures, share: float) -> dict[str, list[int]]:
    """Takes the share of the heads that matters least out, in place, and returns which by layer."""
    removed = prune_heads(network.model, share, head_importance(network.model, pictures.labelled()))
    _record(network, {"type": "prune_heads", "heads": removed})
    return removed


@torch.inference_mode()
def accuracy(network: Prunable, pictures: Pictures) -> float:
    """Per cent of the pictures, all of which have a label, that get their class."""
    right = [network.model(images).argmax(1) == labels for images, labels in pictures]
    return 100 * torch.cat(right).float().mean().item()


def write(network: Prunable, path: str | Path) -> None:
    """Writes a checkpoint that `zoo.checkpoints.load_trained` and all commands load, and training takes as weights."""
    state = {f"{MODEL_PREFIX}{name}": value for name, value in network.model.state_dict().items()}
    with replacing(path) as written:
        torch.save({"zoo": network.record, "state_dict": state}, written)


def _record(network: Prunable, change: Change) -> None:
    network.record["changes"] = [*network.record.get("changes", ()), {key: value for key, value in change.items() if value is not None}]
