"""Segmentation in 2-D and 3-D as a task of the engine, with MONAI's losses and sliding windows."""
from collections.abc import Mapping, Sequence
from typing import Self, cast

from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from zoo import ConnectivityLoss
from zoo.errors import InputError
from zoo.mm.monai import monai_part
from zoo.mm.networks import create_network, freeze_but, plain
from zoo.models.dconnnet import AUTHORS_NAMES
from zoo.models.encoders import TimmEncoder
from zoo.weights import load_weights, own_names, weights_in


@MODELS.register_module()
class Segmentor(BaseModel):
    """Any registered network that gives logits of the input's size, such as the U-Nets of the zoo.

    Args:
        name: a registered name.
        args: further arguments of `timm.create_model`, for example `num_classes`, `in_chans`, `widths`.
        loss: a loss of `monai.losses` by its `type`, default DiceCELoss (Dice and cross-entropy), with its arguments. It gets
            logits and class indices: `softmax` and `to_onehot_y` are set. Of networks that put out connections of pixels,
            `zoo.ConnectivityLoss` with its arguments.
        window: sizes of the windows in which evaluation goes through larger images; None for whole images.
        overlap: share of a window that its neighbours cover too.
        weights: a file whose weights training starts from: those of the network, but for its head, or of its encoder alone. Read when
            training starts; what evaluates or resumes does not need it.
        freeze: the way down, the network's encoder, does not learn.

    Raises InputError for an unknown name, loss, or argument.
    """

    task = "segmentation"

    def __init__(self, name: str, args: Mapping | None = None, loss: Mapping | None = None, window: Sequence[int] | None = None,
                 overlap: float = 0.25, weights: str | None = None, freeze: bool = False):
        super().__init__()
        self.name, self.args = name, plain(args or {})
        self.model = create_network(name, self.args)
        self.num_classes = self.model.num_classes
        self.window, self.overlap, self.weights, self.freeze = window, overlap, weights, freeze
        if window is not None and len(window) != self.model.spatial_dims:
            raise InputError(f"window={tuple(window)} is for {len(window)}-D, and {name} takes {self.model.spatial_dims}-D input")
        self.connectivity = getattr(self.model, "connectivity", False)
        self.loss = self._loss(loss or {})
        self.train()

    def _loss(self, loss: Mapping) -> nn.Module:
        kind, options = loss.get("type"), {key: value for key, value in loss.items() if key != "type"}
        if not self.connectivity and kind == "ConnectivityLoss":
            raise InputError(f"ConnectivityLoss is of connections of pixels, which {self.name} does not put out; a U-Net does with "
                             "model.args.connectivity=True")
        if not self.connectivity:
            return monai_part("losses", {"type": "DiceCELoss", "softmax": True, "to_onehot_y": True, **loss})
        if kind not in (None, "ConnectivityLoss"):
            raise InputError(f"{self.name} puts out connections of pixels, whose loss is ConnectivityLoss, not {kind}")
        if options.get("variant") == "bicon" and self.num_classes > 2:
            raise InputError(f"variant='bicon' is for a thing and its background, and the model has {self.num_classes} classes; "
                             "variant='dconn' is for any")
        try:
            return ConnectivityLoss(**options)
        except TypeError as error:
            raise InputError(f"ConnectivityLoss cannot be set up: {error}") from error

    def init_weights(self) -> None:
        """Loads `weights`, if there are any; the network has been initialised, and the engine would do so again."""
        if self.weights is None:
            return
        encoder = getattr(self.model, "encoder", None)
        whole = any(name.startswith(("encoder.", *AUTHORS_NAMES)) for name in weights_in(self.weights, own=own_names(self.model)))
        if isinstance(encoder, TimmEncoder) and not whole:
            encoder.load_weights(self.weights)
        else:
            load_weights(self.model, self.weights, new_head=True)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze and mode:
            freeze_but(self.model.encoder)
        return self

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor",
                spacing: Tensor | None = None) -> Tensor | dict | list[dict]:
        """`inputs` (B, C, H, W) or (B, C, D, H, W), `targets` class indices without the channel axis, `spacing` (B, 3) of volumes.

        Mode "tensor" gives the logits; "loss" a dict with the scalar `loss`; "predict" one dict per image with `labels`, the
        most probable classes, `target`, and `spacing` if there is one.
        """
        match mode:
            case "tensor":
                return self.model(inputs)
            case "loss":
                out, labels = self.model(inputs), cast(Tensor, targets)
                return {"loss": self.loss(out, labels) if self.connectivity else self.loss(out.float(), labels[:, None])}
            case "predict":
                found = {"labels": self._logits(inputs).argmax(1), "target": cast(Tensor, targets)}
                found |= {} if spacing is None else {"spacing": spacing}
                return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        raise ValueError(f"unknown mode {mode!r}: it is one of tensor, loss, predict")

    def _logits(self, inputs: Tensor) -> Tensor:
        if self.window is None:
            return self.model(inputs)
        from monai.inferers import sliding_window_inference

        return cast(Tensor, sliding_window_inference(inputs, self.window, 4, self.model, overlap=self.overlap, mode="gaussian"))
