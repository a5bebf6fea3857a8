"""What is changed in Ultralytics, all of it here: its parser and loader of model files, its counter, and what restricted loading allows."""
import contextlib
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from ultralytics import nn as names
from ultralytics.engine import model as engine
from ultralytics.nn import tasks
from ultralytics.utils import callbacks, torch_utils
from ultralytics.utils.export import engine as exporting

from zoo.attach import _run_attached as run_attached
from zoo.errors import InputError
from zoo.exporting.onnx import DEFORM_CONV_OPSET, FREE_SIZE, OPSETS, TRACED_BATCH, convert
from zoo.kernels.deform_conv2d import spelled_out_in_exports
from zoo.kernels.deform_conv2d.reference import flops as deform_flops

from .modules import Backbone, Layer
from .ready import loader_of
from .rows import NAMES, parser_of

COUNTED = tasks.DetectionModel, tasks.SegmentationModel, tasks.PoseModel, tasks.OBBModel, tasks.ClassificationModel


def register() -> None:
    """Makes zoo's names known to Ultralytics, once."""
    if all(name in vars(tasks) for name in NAMES):
        return
    for name, kind in NAMES.items():
        setattr(tasks, name, kind)
    tasks.parse_model = names.parse_model = parser_of(tasks.parse_model)
    tasks.yaml_model_load = names.yaml_model_load = engine.yaml_model_load = loader_of(tasks.yaml_model_load)
    torch_utils.get_flops = counter_of(torch_utils.get_flops)
    exporting.torch2onnx = exporter_of(exporting.torch2onnx)
    callbacks.default_callbacks["on_pretrain_routine_start"].append(import_in_workers)
    allow_in_restricted_loading()


def import_in_workers(trainer: Any) -> None:
    """Does nothing. Trainers take it, as a callback, to the processes of a training on several GPUs, which import this module for it."""


def allow_in_restricted_loading() -> None:
    """Lets checkpoints that are loaded with weights_only hold the modules of zoo and timm, as those of torch and Ultralytics."""
    allowed = {f"{name}.{kind.__qualname__}": kind for name, module in list(sys.modules.items()) if name.split(".")[0] in ("timm", "zoo")
               for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == name}
    loader = tasks._SafeLoad
    with loader._lock:
        loader._registry = {**(loader._registry or loader._build()), **allowed, "zoo.attach._run_attached": run_attached}


def counter_of(original: Callable[..., float]) -> Callable[..., float]:
    """Ultralytics' counter, which misses what is no module, and for models of the tasks here torch's, on tensors without data."""

    def gflops(model: nn.Module, imgsz: int | list[int] | tuple[int, ...] = 640) -> float:
        model = torch_utils.unwrap_model(model)
        if type(model) not in COUNTED:
            return original(model, imgsz)
        height, width = imgsz if isinstance(imgsz, (list, tuple)) else (imgsz, imgsz)
        copied: Any = deepcopy(model)
        strides = getattr(copied.model[-1], "stride", None)
        copied = copied.to("meta").eval()
        if strides is not None:
            copied.model[-1].stride = strides  # whose values the head reads
        image = torch.empty(1, copied.yaml["channels"], height, width, device="meta", dtype=next(copied.parameters()).dtype)
        known = {torch.ops.torchvision.deform_conv2d: lambda x, weight, offset, *_, **__: deform_flops(x, offset, weight)}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
            copied(image)
        return counter.get_total_flops() / 1e9

    return gflops


def exporter_of(original: Callable[..., str]) -> Callable[..., str]:
    """Ultralytics' conversion to ONNX, which traces; models with parts of zoo are exported by torch.export, as `zoo export` does it."""

    def torch2onnx(model: nn.Module, im: Tensor, output_file: Path | str, opset: int = 18, input_names: Sequence[str] = ("images",),
                   output_names: Sequence[str] = ("output0",), dynamic: dict[str, dict[int, str]] | None = None) -> str:
        if not any(isinstance(module, (Layer, Backbone)) for module in model.modules()):
            return original(model, im, output_file, opset, input_names, output_names, dynamic)
        if opset not in OPSETS:
            raise InputError(f"opset={opset}: models with parts of zoo are exported with opset {OPSETS[0]} to {OPSETS[-1]}")
        axes = dynamic["images"] if dynamic else {}
        if axes:
            im = im.new_zeros(TRACED_BATCH, im.shape[1], *(max(length, FREE_SIZE[2]) for length in im.shape[2:]))
        with spelled_out_in_exports() if opset < DEFORM_CONV_OPSET else contextlib.nullcontext():
            proto = convert(model, im, axes, opset, list(input_names), list(output_names))
        Path(output_file).write_bytes(proto.SerializeToString())
        return str(output_file)

    return torch2onnx
