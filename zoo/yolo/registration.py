"""What is changed in Ultralytics, all of it here: its parser and loader of model files, its counter, and what restricted loading allows."""
import sys
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.engine import model as engine
from ultralytics.nn import tasks
from ultralytics.utils import callbacks, torch_utils

import zoo.attach

from .ready import loader_of
from .rows import NAMES, parser_of


def register() -> None:
    """Makes zoo's names known to Ultralytics, once."""
    if all(name in vars(tasks) for name in NAMES):
        return
    vars(tasks).update(NAMES)
    tasks.parse_model = parser_of(tasks.parse_model)
    tasks.yaml_model_load = engine.yaml_model_load = loader_of(tasks.yaml_model_load)
    torch_utils.get_flops = gflops
    callbacks.default_callbacks["on_pretrain_routine_start"].append(import_in_workers)


def import_in_workers(trainer: Any) -> None:
    """Does nothing. Trainers take it, as a callback, to the processes of a training on several GPUs, which import this module for it."""


def gflops(model: nn.Module, imgsz: int | list[int] | tuple[int, ...] = 640) -> float:
    """Billions of floating point operations for an image of that size, by torch's own counter, on tensors without data."""
    height, width = imgsz if isinstance(imgsz, (list, tuple)) else (imgsz, imgsz)
    model = torch_utils.unwrap_model(model)
    copied = deepcopy(model)
    strides = getattr(copied.model[-1], "stride", None)
    copied = copied.to("meta").eval()
    if strides is not None:
        copied.model[-1].stride = strides  # whose values the head reads
    channels = next(copied.parameters()).shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copied(torch.empty(1, channels, height, width, device="meta", dtype=next(copied.parameters()).dtype))
    return counter.get_total_flops() / 1e9
