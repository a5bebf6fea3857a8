"""Heads for bags: trained side by side, measured, written and read."""
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.bags import HEADS
from zoo.bags.features import Features
from zoo.errors import InputError
from zoo.files import replacing
from zoo.layers import MultipleInstanceHead
from zoo.losses import MultipleInstanceLoss
from zoo.reading.bags import Bag

RECORD = "zoo_bags"  # under which a file says what its head is


@dataclass(frozen=True)
class Recipe:
    """The authors' (dazhangyu123/ACMIL, Step3_WSI_classification_ACMIL.py): AdamW with weight decay 1e-5, one bag a step, the rate along
    a cosine."""

    epochs: int = 50
    lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise InputError(f"--epochs {self.epochs} --lr {self.lr:g}: there has to be 1 epoch or more, at a rate above 0")


class Answer(NamedTuple):
    """Of a bag: the probabilities of the classes, and the attention of its instances, (N), mean over branches and heads."""

    probabilities: Tensor
    attention: Tensor


@dataclass(frozen=True)
class Trained:
    """A head, how many parameters it has, its accuracy and area under the ROC curve (of more classes one against the rest, the mean; NaN
    where a class is missing) on the part for validation in per cent, and the seconds that it took."""

    name: str
    head: MultipleInstanceHead
    settings: dict[str, Any]
    parameters: int
    accuracy: float
    auc: float
    seconds: float


def train_head(name: str, features: Features, splits: Mapping[str, Sequence[Bag]], classes: int, width: int, recipe: Recipe,
               settings: Mapping[str, Any], device: str = "cpu", progress: Callable[[int], None] = lambda epoch: None) -> Trained:
    """Trains on the part "train" and measures on "val" after the last epoch. A function of its arguments alone.

    Args:
        name: one of `HEADS`.
        width: D of the features.
        settings: further arguments of the head.
    """
    started = time.monotonic()
    settings = {"in_features": width, "num_classes": classes, **HEADS[name], **settings}
    train, loss = list(splits["train"]), MultipleInstanceLoss()
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(recipe.seed)
        head = make_head(settings).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), recipe.lr, weight_decay=1e-5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * len(train))
        for epoch in range(recipe.epochs):
            head.train()
            for i in torch.randperm(len(train)).tolist():
                terms = loss(head(features(train[i]).to(device)), torch.tensor([train[i].label], device=device))
                optimizer.zero_grad()
                torch.stack([*terms.values()]).sum().backward()
                optimizer.step()
                schedule.step()
            progress(epoch + 1)
    probabilities = torch.stack([answer(head, features(bag), device).probabilities for bag in splits["val"]])
    labels = torch.tensor([bag.label for bag in splits["val"]])
    accuracy = 100 * float((probabilities.argmax(1) == labels).float().mean())
    count = sum(parameter.numel() for parameter in head.parameters())
    return Trained(name, head.cpu().eval(), settings, count, accuracy, area(probabilities, labels), time.monotonic() - started)


def make_head(settings: Mapping[str, Any]) -> MultipleInstanceHead:
    """Raises InputError for settings that fit no head."""
    try:
        return MultipleInstanceHead(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def answer(head: MultipleInstanceHead, features: Tensor, device: str = "cpu") -> Answer:
    """Raises InputError for features of another width than the head takes."""
    if features.shape[1] != head.in_features:
        raise InputError(f"the head takes features of width {head.in_features}, and these have {features.shape[1]}")
    with torch.inference_mode():
        out = head.eval()(features.to(device))
    return Answer(out.logits[0].softmax(-1).cpu(), out.attention.flatten(0, -2).mean(0).cpu())


def area(probabilities: Tensor, labels: Tensor) -> float:
    """Under the ROC curve, in per cent."""
    from sklearn.metrics import roc_auc_score
    classes = probabilities.shape[1]
    if len(labels.unique()) < classes:
        return math.nan
    scores = probabilities[:, 1] if classes == 2 else probabilities
    return 100 * float(roc_auc_score(labels.numpy(), scores.double().numpy(), multi_class="ovr"))


def write_head(trained: Trained, classes: Sequence[str], path: str | Path) -> None:
    """Writes the head with its settings and classes, for `read_head`."""
    record = {"name": trained.name, "settings": trained.settings, "classes": list(classes)}
    with replacing(path) as written:
        torch.save({RECORD: record, "state_dict": trained.head.state_dict()}, written)


def read_head(path: str | Path) -> tuple[MultipleInstanceHead, tuple[str, ...]]:
    """The head in a file of `write_head`, and its classes. Nothing in the file is run."""
    try:
        found = torch.load(path, "cpu", weights_only=True)
        record = found[RECORD]
    except Exception as error:  # whatever torch stumbles over in a file of another kind
        raise InputError(f"{path} is no head that `zoo bags` wrote") from error
    head = make_head(record["settings"])
    head.load_state_dict(found["state_dict"])
    return head.eval(), tuple(record["classes"])
