"""The answers of ONNX files that `zoo export` wrote: those of the checkpoints that they were made of, without torch's networks."""
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo, check_record
from zoo.errors import InputError, require, times
from zoo.predicting.answers import Failed, stop
from zoo.predicting.detections import detections
from zoo.predicting.scenes import COLOURS, Scene, SceneInfo, readable_pictures
from zoo.reading.onnx_files import open_session, read_metadata

TOOLBOXES = {"segmentation": "mmseg", "detection": "mmdet"}


class ExportedNetwork(nn.Module):
    """An ONNX file as a network: images (B, C, *sizes) to what it gives, in batches of the size that the file takes.

    `said` is what the file's metadata hold. Raises InputError for a file that `zoo export` did not write, and for images that it
    does not take.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self.session = open_session(path)
        self.said = read_metadata(self.session, path)
        self.num_classes = len(self.said["classes"]) or self.session.get_outputs()[0].shape[1]
        self.scale = self.said.get("scale")  # of networks that restore pictures: how many times larger they get

    @property
    def of_toolbox(self) -> bool:
        """Whether it was a network of mmdetection or mmsegmentation, whose pictures go through their steps."""
        return "steps" in self.said

    def forward(self, images: Tensor) -> Tensor:
        given = self.session.get_inputs()[0]
        size = given.shape[0] if isinstance(given.shape[0], int) else len(images)
        return torch.cat([self._run(given.name, chunk, size) for chunk in images.split(size)])

    def _run(self, name: str, images: Tensor, batch: int) -> Tensor:
        filled = F.pad(images, (*(0, 0) * (images.ndim - 1), 0, batch - len(images)))
        try:
            return torch.from_numpy(self.session.run(None, {name: filled.numpy()})[0][: len(images)])
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise InputError(f"{self.path} does not take images of {times(images.shape[1:])}: {' '.join(str(error).split())}") from error


def exported_info(network: ExportedNetwork) -> ModelInfo:
    """What is known about a classifier, a U-Net or a network that restores pictures. Raises InputError for metadata that are not sound."""
    said = network.said
    check_record(network.path, said, needed=("model", "input_size"))
    if said["task"] == "restoration" and not (isinstance(network.scale, int) and network.scale >= 1):
        raise InputError(f"{network.path} records scale={network.scale!r}, where a whole number above 0 is needed")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()
              if key not in ("model", "classes", "task", "scale")}
    return ModelInfo(said["model"], tuple(said["classes"]), config, said["task"])


def exported_scene_info(network: ExportedNetwork) -> SceneInfo:
    """What is known about a segmentor or detector of the toolboxes."""
    said = network.said
    classes = tuple(map(str, said["classes"]))
    colours = np.asarray(said["palette"], np.uint8) if said.get("palette") else np.resize(COLOURS, (len(classes), 3))
    return SceneInfo(TOOLBOXES[said["task"]], classes, colours, said["steps"], tuple(said.get("category_ids") or ()))


def predict_exported(network: ExportedNetwork, paths: Iterable[str | Path], *, threshold: float = 0.3,
                     failed: Failed = stop) -> Iterator[Scene]:
    """As `zoo.mm.downstream.predict_scenes`, of a file, and without the toolboxes."""
    for path, picture in readable_pictures(paths, threshold, failed):
        image = prepare(network.said, picture)
        size = (picture.height, picture.width)
        if network.said["task"] == "segmentation":
            logits = F.interpolate(_logits(network, image), size, mode="bilinear", align_corners=network.said["align_corners"])
            yield Scene(path, classes=logits[0].argmax(0).numpy())
            continue
        config = network.said["test_cfg"]
        boxes, scores, labels = detections(network(image)[0].numpy(), size, score_thr=config["score_thr"],
                                           iou_threshold=config["nms"]["iou_threshold"], max_per_img=config["max_per_img"])
        kept = scores >= threshold
        yield Scene(path, labels[kept], scores[kept], boxes[kept])


def prepare(said: Mapping[str, Any], picture: Image.Image) -> Tensor:
    """(1, 3, H, W): the picture as the network takes it. Raises InputError for a step of the toolbox other than `Resize`."""
    require("resizing pictures as mmcv does", "train", "cv2")
    import cv2
    pixels = np.asarray(picture.convert("RGB"))
    for step in said["steps"]:
        if step.get("type") != "Resize" or not step.get("scale"):
            raise InputError(f"the pictures of this network go through {step.get('type')}, which cannot be done without its toolbox; "
                             "predict with the checkpoint")
        height, width = pixels.shape[:2]
        if step.get("keep_ratio"):
            factor = min(max(step["scale"]) / max(height, width), min(step["scale"]) / min(height, width))
            size = (int(width * factor + 0.5), int(height * factor + 0.5))
        else:
            size = tuple(step["scale"])
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    pixels = pixels if said["channels"] == "RGB" else pixels[..., ::-1]
    normal = (pixels / 255 - said["mean"]) / said["std"]
    return torch.from_numpy(normal.astype(np.float32).transpose(2, 0, 1).copy())[None]


def _logits(network: ExportedNetwork, image: Tensor) -> Tensor:
    """Of the whole image, or averaged over windows where the network was evaluated in windows."""
    config = network.said["test_cfg"]
    if config.get("mode") != "slide":
        return network(image)
    size = tuple(image.shape[2:])
    starts = []
    for length, crop, stride in zip(size, config["crop_size"], config["stride"], strict=True):
        count = max(length - crop + stride - 1, 0) // stride + 1
        starts.append([max(min(i * stride + crop, length) - crop, 0) for i in range(count)])
    sums, times_seen = torch.zeros(1, network.num_classes, *size), torch.zeros(size)
    for top in starts[0]:
        for left in starts[1]:
            window = (..., slice(top, top + config["crop_size"][0]), slice(left, left + config["crop_size"][1]))
            sums[window] += network(image[window])
            times_seen[window] += 1
    return sums / times_seen
