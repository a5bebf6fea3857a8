"""Networks that have learned something of digits, as ONNX files of `zoo export`."""
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from zoo.checkpoints import ModelInfo
from zoo.exporting.onnx import export_onnx
from zoo.reading.digits import CLASSES, Digits, grey_scene
from zoo.reading.pictures import picture_tensor


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """Of digits in pictures of any size, which are brought to 32 pixels."""
    torch.manual_seed(0)
    config = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    digits = Digits("train", limit=960)
    pictures = torch.stack([picture_tensor(picture, config["mean"], config["std"]) for picture in digits.images])
    labels = torch.tensor(digits.targets)
    model = timm.create_model("biformer_nano", num_classes=10, in_chans=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for places in torch.randperm(len(labels)).split(32):
        cross_entropy(model(pictures[places]), labels[places]).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("classifier") / "digits.onnx"
    export_onnx(model.eval(), ModelInfo("biformer_nano", CLASSES, config), path)
    return path


@pytest.fixture(scope="session")
def unet(tmp_path_factory) -> Path:
    """Of the ink of digits in scenes."""
    torch.manual_seed(0)
    config = {"input_size": (1, 64, 64), "mean": (0.5,), "std": (0.25,)}
    digits = Digits("train")
    scenes, maps = zip(*(grey_scene(digits, 64, np.random.default_rng(index)) for index in range(16)), strict=True)
    pictures = torch.from_numpy((np.stack(scenes) - 0.5) / 0.25).float()[:, None]
    ink = torch.from_numpy(np.stack(maps) > 0).long()
    model = timm.create_model("attention_unet_nano", num_classes=2, in_chans=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(24):
        places = slice(step % 4 * 4, step % 4 * 4 + 4)
        cross_entropy(model(pictures[places]), ink[places]).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("unet") / "ink.onnx"
    export_onnx(model.eval(), ModelInfo("attention_unet_nano", ("background", "ink"), config, "segmentation"), path)
    return path
