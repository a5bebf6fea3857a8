"""Segmentors of mmsegmentation and RetinaNet of mmdetection as plain networks, which `zoo.exporting.onnx.export_onnx` takes.

What comes before and after such a network is in the metadata of its file, as JSON (docs/guides/exporting.md uses them):

    image   (B, 3, H, W): the picture with its `channels` in that order, resized as `steps` say, / 255, minus `mean`, over `std`;
            padding is inside
    logits  (B, classes, H, W), of a segmentor: to be resized to the picture, bilinearly, as `align_corners` says; the class
            of a pixel is the largest. Where `test_cfg` has the mode "slide", of windows of `crop_size` every `stride`,
            averaged where they overlap
    found   (B, N, 4 + classes), of a RetinaNet: at every anchor the box (left, top, right, bottom, as fractions of width and
            height) and the score of each class. What remains is what
            `zoo.predicting.detections.detections` gives, with the numbers of `test_cfg`
"""
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo, Opened
from zoo.errors import InputError
from zoo.exporting.adaptive_pooling import AdaptiveAvgPool
from zoo.mm.downstream import load_scene_model
from zoo.mm.networks import plain
from zoo.predicting.scenes import SceneInfo


def load_deployable(checkpoint: str | Path | Opened) -> tuple[nn.Module, ModelInfo]:
    """The network in a checkpoint of a segmentor or RetinaNet, and what its file is to say. Raises InputError for another."""
    return deployable(*load_scene_model(checkpoint))


def deployable(model: Any, info: SceneInfo) -> tuple[nn.Module, ModelInfo]:
    """The same of a model that is already there. The model is changed: some of its layers make way for ones that export."""
    if info.toolbox == "mmseg":
        if model.out_channels == 1:
            raise InputError("segmentors with a channel for each class can be exported; this one tells two classes apart by a single one")
        network, task, output = Segmentor(model), "segmentation", "logits"
    elif type(model).__name__ == "RetinaNet":
        network, task, output = RetinaNet(model), "detection", "found"
    else:
        raise InputError(f"segmentors and RetinaNet can be exported; {type(model).__name__} cannot")
    sizes = [step["scale"] for step in info.steps if isinstance(step.get("scale"), tuple)]
    data_config = {
        "input_size": (3, *sorted(sizes[0])) if sizes else (3, 512, 512),
        **{key: tuple((getattr(model.data_preprocessor, key).flatten() / 255).tolist()) for key in ("mean", "std")},
        "channels": "RGB" if model.data_preprocessor._channel_conversion else "BGR",  # pictures are read as BGR
        "steps": info.steps, "test_cfg": plain(model.test_cfg), "palette": np.asarray(info.colours).tolist()}
    more = {"align_corners": bool(model.align_corners)} if task == "segmentation" else {"category_ids": info.category_ids}
    return network.eval(), ModelInfo(model.backbone.name, info.classes, data_config | more, task, output)


class Segmentor(nn.Module):
    """(B, 3, H, W) → logits (B, classes, H, W)."""

    def __init__(self, model: Any):
        super().__init__()
        self.divisor = (model.data_preprocessor.test_cfg or {}).get("size_divisor") or 1
        self.model = _exportable(model)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = _padded(images, self.divisor)
        logits = self.model.encode_decode(padded, [{"img_shape": (padded.shape[2], padded.shape[3])}])
        return logits[..., :height, :width]


class RetinaNet(nn.Module):
    """(B, 3, H, W) → (B, N, 4 + classes): boxes as fractions of the picture, and scores."""

    def __init__(self, model: Any):
        super().__init__()
        self.divisor = model.data_preprocessor.pad_size_divisor
        self.model = _exportable(model)

    def forward(self, images: Tensor) -> Tensor:
        head = self.model.bbox_head
        levels, deltas = head(self.model.extract_feat(_padded(images, self.divisor)))
        anchors = torch.cat(head.prior_generator.grid_priors([level.shape[2:] for level in levels], device=images.device))
        scores = torch.cat([_by_anchor(level, head.num_classes) for level in levels], 1).sigmoid()
        deltas = torch.cat([_by_anchor(delta, 4) for delta in deltas], 1)
        boxes = head.bbox_coder.decode(anchors.repeat(images.shape[0], 1), deltas.flatten(0, 1)).view_as(deltas)
        edges = torch.stack([boxes[..., 0::2] / images.shape[3], boxes[..., 1::2] / images.shape[2]], -1).flatten(-2)
        return torch.cat([edges.clamp(0, 1), scores], -1)


def _by_anchor(values: Tensor, width: int) -> Tensor:
    """(B, anchors · width, H, W) → (B, H · W · anchors, width)."""
    return values.permute(0, 2, 3, 1).reshape(values.shape[0], -1, width)


def _padded(images: Tensor, divisor: int) -> Tensor:
    height, width = (divisor * ((length + divisor - 1) // divisor) - length for length in images.shape[2:])
    return F.pad(images, (0, width, 0, height))


def _exportable(model: Any) -> Any:
    """Puts layers that export with free sizes into the places of those that do not."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, AdaptiveAvgPool(cast(int, child.output_size)))
            elif type(child).__name__ == "Upsample" and getattr(child, "scale_factor", None):  # mmseg's multiplies sizes as floats
                replaced = cast(nn.Upsample, child)  # of the same attributes
                setattr(parent, name, nn.Upsample(None, replaced.scale_factor, replaced.mode, replaced.align_corners))
    return model
