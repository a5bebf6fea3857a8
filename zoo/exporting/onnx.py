"""Models as ONNX files that have been checked, run and compared before they are left anywhere.

Differences are those of outputs of unit variance: they are divided by the standard deviation of PyTorch's outputs.

The sizes (height and width, of volumes depth too) of an exported model are free if three things hold: PyTorch runs the
model at other sizes, its graph can be traced with symbolic sizes, and ONNX Runtime computes the same from it at other
sizes. Otherwise they are fixed, and the reason is told.
"""
import contextlib
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.export import Dim

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError, require, said_by
from zoo.files import check_writable, replacing
from zoo.kernels.deform_conv2d import spelled_out_in_exports
from zoo.reading import onnx_files

OPSETS = range(18, 24)  # what both torch's exporter writes and ONNX Runtime runs
DEFORM_CONV_OPSET = 19
TOLERANCE = 1e-4
TRACED_BATCH = 2  # torch.export takes a length of one for a constant, whether of the batch …
FREE_SIZE = {2: 512, 3: 256}  # … or of a map, or of blocks on it, that strides have made few; tracing computes nothing of large images
AXES = {2: ("height", "width"), 3: ("depth", "height", "width")}
INPUT = "image"
CROPS = ("interpolation", "crop_pct", "crop_mode")
# By task and dimensions: what timm says of every model, and nothing is done with.
MEANINGLESS = {**{(task, 2): CROPS for task in ("fixations", "restoration", "saliency", "segmentation")},
               ("segmentation", 3): (*CROPS, "mean", "std")}


class ExportError(RuntimeError):
    """The exported model does not run or does not compute what the PyTorch model computes."""


@dataclass(frozen=True)
class Comparison:
    """The largest difference between the logits of PyTorch and of ONNX Runtime for one shape of input.

    In standard deviations of all of PyTorch's logits; as it is where those do not vary.
    """

    batch: int
    size: tuple[int, ...]
    difference: float


@dataclass(frozen=True)
class Exported:
    """An exported file: which axes are free, why the sizes are not if they are not, and how it compares."""

    path: Path
    free_batch: bool
    free_size: bool
    reason: str
    comparisons: list[Comparison]

    @property
    def worst(self) -> float:
        return max(comparison.difference for comparison in self.comparisons)


def export_onnx(model: nn.Module, info: ModelInfo, path: str | Path, *, size: tuple[int, ...] | None = None,
                free_size: bool = True, batch: int | None = None, opset: int = 20, spell_out: bool = False,
                progress: Callable[[str], None] = lambda step: None) -> Exported:
    """Writes `model` to `path` as ONNX: `image` (batch, channels, height, width) float32 -> `logits` (batch, classes).

    Networks for volumes take (batch, channels, depth, height, width), those that segment or cut out give (batch, classes, *sizes), and
    those that restore pictures give `picture` (batch, channels, scale · height, scale · width); those that say
    where people look `saliency` (batch, 1, *sizes).
    `size` (height, width, or depth, height, width) is what it is compared at, with others around it, and the only size
    accepted where `free_size` is false or cannot be had; the default is the model's own. `batch` fixes the batch size,
    None leaves it free. Class names and preprocessing are written to the file's metadata as JSON. `spell_out` writes
    deformable convolutions in operators of opset 16, for runtimes without `DeformConv`, as is done anyway where `opset`
    has none. `progress` is called with the name of each step.

    Raises InputError for an argument that cannot be used, and ExportError if ONNX Runtime fails or differs from
    PyTorch by more than 1e-4 on outputs of unit variance; `path` is then as it was before.
    """
    path, size = Path(path), tuple(size or info.input_size[1:])
    _check_arguments(path, size, len(info.input_size) - 1, batch, opset)
    require("exporting", "export", "onnx", "onnxscript", "onnxruntime")
    reason = "" if free_size else "as asked"
    if free_size:
        progress("running PyTorch at other sizes")
        reason = _why_not_other_sizes(model, info, size)
    with spelled_out_in_exports() if spell_out or opset < DEFORM_CONV_OPSET else contextlib.nullcontext():
        if not reason:
            try:
                return _export(model, info, path, size, True, batch, opset, "", progress)
            except _SizesNotFreeError as error:
                reason = str(error)
        return _export(model, info, path, size, False, batch, opset, reason, progress)


def other_sizes(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes to try beside `size`: odd, wide, tall, smaller and larger; a volume's depth as its height."""
    *heights, width = size
    return [tuple(n + 1 for n in size), (*(n * 3 // 4 | 1 for n in heights), width * 5 // 4 | 1), (*(n * 3 // 2 for n in heights), width)]


def open_session(path: Path):
    """As `zoo.reading.onnx_files.open_session` of a file that was just written. Raises ExportError."""
    try:
        return onnx_files.open_session(path)
    except InputError as error:
        raise ExportError(said_by(error)) from error


class _SizesNotFreeError(Exception):
    """The model cannot be exported with free sizes, though perhaps with fixed ones.

    Also where ONNX Runtime computes something else at another size: the trace then took a size for a constant.
    """


def _check_arguments(path: Path, size: tuple[int, ...], dims: int, batch: int | None, opset: int) -> None:
    check_writable(path)
    if opset not in OPSETS:
        raise InputError(f"opset {opset} is not available; {OPSETS[0]} to {OPSETS[-1]} are")
    if len(size) != dims:
        raise InputError(f"the size {times(size)} has {len(size)} numbers, where {' and '.join(AXES[dims])} are needed")
    if min(size) < 1:
        raise InputError(f"the size {times(size)} is not positive")
    if batch is not None and batch < 1:
        raise InputError(f"the batch size {batch} is not positive")


def _images(info: ModelInfo, batch: int, size: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(batch, info.input_size[0], *size, generator=torch.Generator().manual_seed(0))


def _logits(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(images).numpy()


def _why_not_other_sizes(model: nn.Module, info: ModelInfo, size: tuple[int, ...]) -> str:
    """An empty string if PyTorch runs the model at other sizes. Raises InputError if it does not run at `size`."""
    for other in [size, *other_sizes(size)]:
        try:
            _logits(model, _images(info, 1, other))
        except Exception as error:  # models refuse sizes by whatever their layers raise
            said = f"{info.name} does not take {times(other)} images: {said_by(error)}"
            if other == size:
                raise InputError(said) from error
            return said
    return ""


def _export(model: nn.Module, info: ModelInfo, path: Path, size: tuple[int, ...], free_size: bool, batch: int | None,
            opset: int, reason: str, progress: Callable[[str], None]) -> Exported:
    import onnx
    failure = _SizesNotFreeError if free_size else ExportError
    traced = tuple(max(length, FREE_SIZE[len(size)]) for length in size) if free_size else size
    progress(f"tracing at {times(traced)}")
    try:
        axes = ({0: "batch"} if batch is None else {}) | (dict(enumerate(AXES[len(size)], 2)) if free_size else {})
        proto = convert(model, _images(info, batch or TRACED_BATCH, traced), axes, opset, [INPUT], [info.output])
        _set_metadata(proto, info, size, getattr(model, "scale", None) if info.task == "restoration" else None)
        progress("checking the file")
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # torch.export, the translation and the checker each have families of exceptions
        if isinstance(error, torch.onnx.OnnxExporterError):  # which only says that there is a cause
            error = error.__cause__ or error
        raise failure(f"tracing {info.name} failed: {said_by(error)}") from error
    with replacing(path) as written:
        written.write_bytes(proto.SerializeToString())
        comparisons = _compare(model, info, written, size, free_size, batch, progress)
        for found in comparisons:
            if not found.difference <= TOLERANCE:  # also true of NaN
                raise failure(f"ONNX Runtime differs from PyTorch by {found.difference:.3g} at batch {found.batch}, "
                              f"{times(found.size)}, more than {TOLERANCE:g}")
    return Exported(path, batch is None, free_size, reason, comparisons)


def convert(model: nn.Module, images: torch.Tensor, axes: dict[int, str], opset: int, inputs: Sequence[str], outputs: Sequence[str]):
    """The ModelProto of `model`. `axes` are free, under these names; what the trace assumed of them is checked by running, not here.

    Neither a free length of `images` nor those of the maps made of it should be one: torch takes one for a constant.
    """
    with _quiet(), _without_slow_rules(), torch.no_grad():  # attention whose mask has gradients has other strides, which trouble torch
        program = torch.export.export(model, (images,), dynamic_shapes=(dict.fromkeys(axes, Dim.DYNAMIC),),
                                      prefer_deferred_runtime_asserts_over_guards=True)
        converted = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, opset_version=opset,
                                      dynamic_shapes=(axes,), verbose=False)
        return cast(torch.onnx.ONNXProgram, converted).model_proto


def _set_metadata(proto, info: ModelInfo, size: tuple[int, ...], scale: int | None) -> None:
    graph = proto.graph
    for described in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del described.metadata_props[:]  # the exporter's notes, paths on this machine among them
    said = {key: value for key, value in info.data_config.items() if key not in MEANINGLESS.get((info.task, len(size)), ())}
    said |= {} if scale is None else {"scale": scale}
    recorded = {"task": info.task, "model": info.name, "classes": info.classes, **said, "input_size": (info.input_size[0], *size)}
    for key, value in recorded.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))


def _compare(model: nn.Module, info: ModelInfo, path: Path, size: tuple[int, ...], free_size: bool, batch: int | None,
             progress: Callable[[str], None]) -> list[Comparison]:
    session = open_session(path)
    batches = (1, 3) if batch is None else (batch,)
    sizes = [size, *other_sizes(size)] if free_size else [size]
    pairs = {}
    for compared, count in itertools.product(sizes, batches):
        progress(f"comparing batch {count}, {times(compared)}")
        images = _images(info, count, compared)
        try:
            found = cast(np.ndarray, session.run([info.output], {INPUT: images.numpy()})[0])
        except Exception as error:
            said = f"ONNX Runtime does not run batch {count}, {times(compared)}: {said_by(error)}"
            raise (_SizesNotFreeError if free_size else ExportError)(said) from error
        pairs[count, compared] = found.astype(np.float64), _logits(model, images)
    deviation = np.concatenate([expected.ravel() for _, expected in pairs.values()]).std() or 1.0
    return [Comparison(count, shape, float(np.abs(found - expected).max() / deviation))
            for (count, shape), (found, expected) in pairs.items()]


def times(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


@contextlib.contextmanager
def _without_slow_rules() -> Iterator[None]:
    """Leaves out of onnxscript's optimizer the rules that end in several nodes.

    For them it lists the whole graph again at every node, most of the time that a large graph takes; the graphs of BiFormer, DAS,
    polarized and SK networks have the same operators without. The names are onnxscript's own: where they are missing, exporting is slower.
    """
    from onnxscript import rewriter
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    fast = tuple(rule for rule in rules if getattr(getattr(rule, "_target_pattern", None), "has_single_output_node", True))
    with mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", fast, create=True):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporter from talking about itself on stdout, stderr and through warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
