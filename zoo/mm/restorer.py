"""Restoring pictures, such as super-resolution, as a task of the engine."""
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.mm.networks import create_network, plain
from zoo.predicting.restoration import OVERLAP, of_pixels, restore
from zoo.weights import load_weights

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


@MODELS.register_module()
class Restorer(BaseModel):
    """Any registered network that gives pictures, `scale` times as large as those that it takes, such as A2N and HAN.

    Args:
        name: a registered name.
        args: further arguments of `timm.create_model`, for example `dim`, `depth`, `in_chans`.
        loss: "l1", the mean absolute difference of pixels from 0 to 255, or "l2", the mean squared one.
        window: sizes of the tiles in which evaluation goes through larger pictures; default 256×256.
        overlap: share of a tile that its neighbours cover too.
        ensemble: evaluation takes the mean over a picture turned and mirrored in all eight ways.
        weights: a file whose weights training starts from. Read when training starts; what evaluates or resumes does not need it.

    Raises InputError for an unknown name, loss, or argument, and for a network that gives no pictures.
    """

    task = "restoration"

    def __init__(self, name: str, args: Mapping | None = None, loss: str = "l1", window: Sequence[int] | None = None,
                 overlap: float = OVERLAP, ensemble: bool = False, weights: str | None = None):
        super().__init__()
        if loss not in LOSSES:
            raise InputError(f"unknown loss {loss!r}: it is one of {', '.join(LOSSES)}")
        self.name, self.args = name, plain(args or {})
        self.model = create_network(name, self.args)
        if getattr(self.model, "task", None) != self.task:
            raise InputError(f"{name} does not give pictures, as networks that restore them do, such as a2n_nano_x2")
        self.loss, self.weights = loss, weights
        self.window, self.overlap, self.ensemble = window, overlap, ensemble
        channels, cfg = self.model.in_chans, self.model.pretrained_cfg
        self.seen = {key: tuple(cfg[key]) if len(cfg[key]) == channels else (sum(cfg[key]) / len(cfg[key]),) * channels
                     for key in ("mean", "std")}

    def init_weights(self) -> None:
        """Loads `weights`, if there are any; the network has been initialised, and the engine would do so again."""
        if self.weights is not None:
            load_weights(self.model, self.weights)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Tensor | dict | list[dict]:
        """`inputs` (B, C, H, W) and `targets` (B, C, scale·H, scale·W) uint8.

        Mode "tensor" gives pixels as floats; "loss" a dict with the scalar `loss`; "predict" one dict per picture with what was `given`,
        the `restored` picture and the `target`, all uint8.
        """
        match mode:
            case "tensor":
                return of_pixels(self.model, inputs, **self.seen)
            case "loss":
                restored = of_pixels(self.model, inputs, **self.seen)
                return {"loss": LOSSES[self.loss](restored.float(), cast(Tensor, targets).float())}
            case "predict":
                info = ModelInfo(self.name, (), {"input_size": tuple(inputs.shape[1:]), **self.seen}, self.task)
                return [{"given": given, "target": target, "restored": self._restored(info, given).to(target.device)}
                        for given, target in zip(inputs, cast(Tensor, targets), strict=True)]
        raise ValueError(f"unknown mode {mode!r}: it is one of tensor, loss, predict")

    def _restored(self, info: ModelInfo, given: Tensor) -> Tensor:
        with torch.no_grad():
            return restore(self.model, info, given, window=self.window, overlap=self.overlap, ensemble=self.ensemble)
