"""Heads that learn from tokens in files, side by side, and their files, which every command takes."""
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.checkpoints import MODEL_PREFIX, ModelInfo
from zoo.errors import InputError
from zoo.files import replacing
from zoo.probe import POOLINGS, Pooling, head_for, probe, width_of
from zoo.probing.tokens import Tokens

READ: dict[Pooling, str] = {"attentive": "tokens", "simpool": "tokens", "linear": "mean", "class": "class_token"}  # of a picture
QUERIES = 32  # at most, by default


@dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay; the rate rises for a tenth of the steps and falls to 0 along a cosine."""

    epochs: int = 50
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or not 0 < self.lr < math.inf:
            raise InputError(f"--epochs {self.epochs} --batch {self.batch} --lr {self.lr:g}: there has to be 1 epoch or more, of batches "
                             "of 2 or more, at a rate above 0")


@dataclass(frozen=True)
class Trained:
    """A head, its pooling, how many parameters learned, its accuracy on the part for validation in per cent, the seconds it took."""

    pooling: Pooling
    head: nn.Sequential
    parameters: int
    accuracy: float
    seconds: float


def heads_of(network: nn.Module, asked: Iterable[str] | None, queries: int | None, norm: bool = True) -> tuple[list[Pooling], int]:
    """The poolings that are asked for, or all that the network has tokens for, and the queries of the attentive one.

    Raises InputError for a pooling without tokens, and for what `zoo.probe` refuses.
    """
    width, class_token = width_of(network)
    possible: list[Pooling] = [pooling for pooling in POOLINGS if pooling != "class" or class_token]
    if asked is not None and "class" in asked and "class" not in possible:
        raise InputError(f"{type(network).__name__} has no class token, of which --heads class could be made; {', '.join(possible)} can be")
    queries = queries or max(count for count in range(1, QUERIES + 1) if width % count == 0)
    probe(network, 1, queries, norm=norm)
    return [pooling for pooling in possible if asked is None or pooling in asked], queries


def train_head(tokens: Mapping[str, Tokens], classes: int, pooling: Pooling, queries: int, recipe: Recipe, device: str = "cpu",
               progress: Callable[[int], None] = lambda epoch: None) -> Trained:
    """Trains a head on the part "train", and measures it on "val" after the last epoch, whatever it was before.

    A function of its arguments alone. Of tokens, one batch is in memory at a time. `progress` is called with the number of epochs done.
    """
    train, val = tokens["train"], tokens["val"]
    if len(train) < 2:
        raise InputError(f"a head learns from 2 pictures or more, and there is {len(train)} for training")
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = head_for(train.width, classes, pooling, queries)
    head = head.to(device).train()
    order = torch.Generator().manual_seed(recipe.seed)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.lr, weight_decay=0)
    steps = math.ceil(len(train) / recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * steps, pct_start=0.1)
    for epoch in range(recipe.epochs):
        for batch in torch.randperm(len(train), generator=order).tensor_split(steps):  # of 2 at least, as batch norms need
            optimizer.zero_grad()
            F.cross_entropy(head(train.rows(READ[pooling], batch.tolist()).to(device)), train.labels[batch].to(device)).backward()
            optimizer.step()
            schedule.step()
        progress(epoch + 1)
    accuracy = 100 * float((_answers(head.eval(), val, pooling, recipe.batch, device) == val.labels).float().mean())
    count = sum(parameter.numel() for parameter in parameters)
    return Trained(pooling, head.cpu(), count, accuracy, time.monotonic() - started)


def _answers(head: nn.Module, tokens: Tokens, pooling: Pooling, batch: int, device: str) -> Tensor:
    with torch.inference_mode():
        return torch.cat([head(tokens.rows(READ[pooling], chosen.tolist()).to(device)).argmax(1).cpu()
                          for chosen in torch.arange(len(tokens)).split(batch)])


def write_probe(trained: Trained, network: nn.Module, info: ModelInfo, classes: Sequence[str], model_args: Mapping[str, Any],
                queries: int, norm: bool, path: str | Path) -> None:
    """Writes network and head as a checkpoint that `zoo predict`, `visualize` and `export` take.

    `model_args` are those of timm.create_model that gave the network.
    """
    whole = probe(network, len(classes), queries, pooling=trained.pooling, norm=norm)
    whole.head.load_state_dict(trained.head.state_dict())
    record = {"task": "classification", "model": info.name, "model_args": dict(model_args), "classes": list(classes),
              "probe": {"queries": queries, "pooling": trained.pooling, "norm": norm},
              **{key: info.data_config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}}
    if info.changes:
        record["changes"] = [dict(change) for change in info.changes]
    state = {f"{MODEL_PREFIX}{name}": value.cpu() for name, value in whole.state_dict().items()}
    with replacing(path) as written:
        torch.save({"zoo": record, "state_dict": state}, written)
