"""Image classification as a task of the engine."""
import contextlib
from collections.abc import Mapping, Sequence
from typing import Self, cast

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from zoo.changes import Change, change
from zoo.checkpoints import start_from
from zoo.errors import InputError
from zoo.losses import AttentionDiversificationLoss, balances
from zoo.mm.networks import create_network, freeze_but, plain
from zoo.models.ifam import TwoStageVisionTransformer
from zoo.part_losses import PartDiscoveryLoss, discoveries

LOSSES = ("cross_entropy", "binary_cross_entropy")


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Any timm classification model, trained with soft targets.

    Targets are one-hot vectors over the C classes, smoothed to 1 - s + s/C and s/C, mixed in pairs by mixup or cutmix
    where asked for. The loss is the cross entropy with the softmax of the logits, or the mean of C binary cross
    entropies with their sigmoids.

    Args:
        name: a name registered with timm.
        args: further arguments of `timm.create_model`, for example `num_classes`, `in_chans`, `drop_path_rate`.
        mixup: arguments of `timm.data.Mixup` other than `num_classes` and `label_smoothing`; None for no mixing.
            Batches must then be of even size.
        label_smoothing: s.
        loss: "cross_entropy" or "binary_cross_entropy".
        attention_diversification: weight of the loss `zoo.AttentionDiversificationLoss`, 0 for none. Its value before weighting
            is logged as `attention_similarity`.
        attention_threshold: that loss's threshold.
        load_balancing: weight of the loss `zoo.LoadBalancingLoss` of networks whose tokens pick heads, 0 for none; the authors of MoH
            have 0.01 (https://github.com/SkyworkAI/MoH). Its value before weighting is logged as `load_balance`.
        part_discovery: arguments of `zoo.PartDiscoveryLoss`, which is what networks that discover parts are trained by; by default the
            authors' for such a network. False for the loss of the logits alone. Classes are compared as `loss` says. Its terms before
            weighting are logged by their names, behind `part_`.
        weights: a file whose weights training starts from, but for the head's: the authors' (`zoo.models.released`), timm's, or a
            checkpoint of `zoo train`. Read when training starts; what evaluates or resumes does not need it.
        freeze: the head alone learns.
        changes: what is done to the network once it is built and has its first weights, each a dict of `type`, one of
            `zoo.changes.CHANGES`, and arguments; checkpoints record it.

    Raises InputError for an unknown name, loss, or argument.
    """

    task = "classification"

    def __init__(self, name: str, args: Mapping | None = None, mixup: Mapping | None = None,
                 label_smoothing: float = 0.0, loss: str = "cross_entropy",
                 attention_diversification: float = 0.0, attention_threshold: float = 2.0, load_balancing: float = 0.0,
                 part_discovery: Mapping | bool | None = None, weights: str | None = None, freeze: bool = False,
                 changes: Sequence[Change] = ()):
        super().__init__()
        if loss not in LOSSES:
            raise InputError(f"unknown loss {loss!r}: it is one of {', '.join(LOSSES)}")
        self.name = name
        self.args = plain(args or {})
        self.label_smoothing = label_smoothing
        self.loss = loss
        self.diversification_weight = attention_diversification
        self.diversification = AttentionDiversificationLoss(attention_threshold) if attention_diversification else None
        self.changes = plain(list(changes))
        self.load_balancing_weight = load_balancing
        self.model = create_network(name, self.args)
        if part_discovery is None:
            part_discovery = any(isinstance(module, TwoStageVisionTransformer) for module in self.model.modules())
        arguments = {} if part_discovery is True else part_discovery
        self.part_discovery = None if arguments is False else self._part_discovery(plain(arguments))
        change(self.model, self.changes)
        self.num_classes, self.weights, self.freeze = self.model.num_classes, weights, freeze
        try:
            self.mixup = None if mixup is None else Mixup(**mixup, label_smoothing=label_smoothing, num_classes=self.num_classes)
        except TypeError as error:
            raise InputError(f"mixup cannot be set up: {error}") from error
        self.train()

    def init_weights(self) -> None:
        """Loads `weights`, if there are any; timm has initialised the model, and the engine would do so again."""
        if self.weights is not None:
            fresh = create_network(self.name, self.args)
            start_from(fresh, self.weights, self.changes)
            self.model.load_state_dict(fresh.state_dict())

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze and mode:
            head = self.model.get_classifier()
            freeze_but(self.model, *(head if isinstance(head, tuple) else [head]))
        return self

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Tensor | dict | list[dict]:
        """`inputs` (B, C, H, W) normalised pixels, `targets` (B,) class indices.

        Mode "tensor" gives the logits (B, classes); "loss" a dict with the scalar `loss` and what else is to be logged;
        "predict" one dict per image with `scores` (classes,), the probabilities, and `target`.
        """
        match mode:
            case "tensor":
                return self.model(inputs)
            case "loss":
                return self._losses(inputs, cast(Tensor, targets))
            case "predict":
                activation = torch.softmax if self.loss == "cross_entropy" else _sigmoid
                scores = activation(self.model(inputs).float(), -1)
                return [{"scores": score, "target": target} for score, target in zip(scores, cast(Tensor, targets), strict=True)]
        raise ValueError(f"unknown mode {mode!r}: it is one of tensor, loss, predict")

    def _losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if self.mixup is not None:
            if len(inputs) % 2:
                raise InputError(f"mixup pairs the images of a batch: {len(inputs)} is not an even batch size")
            inputs, targets = self.mixup(inputs, targets)
        else:
            targets = mixup_target(targets, self.num_classes, smoothing=self.label_smoothing)
        logged = {}
        with contextlib.ExitStack() as watching:
            found = watching.enter_context(balances(self.model)) if self.load_balancing_weight else []
            parts = None if self.part_discovery is None else watching.enter_context(discoveries(self.model))
            logits, similarity = (self.model(inputs), None) if self.diversification is None else self.diversification(self.model, inputs)
        loss = self._criterion(logits, targets)
        if self.part_discovery is not None and parts is not None:
            terms = {"stage_2": loss, **self.part_discovery.of_parts(parts, inputs, targets)}
            loss = self.part_discovery.total(terms)
            logged |= {f"part_{name}": term.detach() for name, term in terms.items()}
        if similarity is not None:
            loss, logged["attention_similarity"] = loss + self.diversification_weight * similarity, similarity.detach()
        if found:
            balance = torch.stack(found).mean()
            loss, logged["load_balance"] = loss + self.load_balancing_weight * balance, balance.detach()
        return {"loss": loss, **logged}

    def _part_discovery(self, arguments: Mapping) -> PartDiscoveryLoss:
        try:
            return PartDiscoveryLoss(**arguments, criterion=self._criterion)
        except TypeError as error:
            raise InputError(f"part_discovery cannot be set up: {error}") from error

    def _criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "binary_cross_entropy":
            return F.binary_cross_entropy_with_logits(logits.float(), targets)
        return F.cross_entropy(logits.float(), targets)


def _sigmoid(logits: Tensor, _: int) -> Tensor:
    return logits.sigmoid()
