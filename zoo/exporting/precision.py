"""Exported models in float16 and int8, by ONNX Runtime's own tools, and what that changes."""
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import timm.data
from PIL import Image
from torch import Tensor

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.exporting.onnx import INPUT, ExportError, open_session
from zoo.reading.pictures import find_pictures, open_picture

FLOAT32_ONLY = ("DeformConv", "GridSample")  # ONNX Runtime has no other kernels of them on the CPU
ARITHMETIC = ("Conv", "Gemm", "MatMul")  # what int8 makes faster; the rest stays as it is
CALIBRATED = 128  # pictures at most


@dataclass(frozen=True)
class Change:
    """What a lower precision changes: the largest difference of the outputs for a random image, in standard deviations; on how many
    pictures the two files were compared, on how many they name the same class, how many are labelled, and, where any are, the
    accuracy of either, in per cent."""

    difference: float
    pictures: int = 0
    same: int = 0
    labelled: int = 0
    before: float | None = None
    after: float | None = None


def lower_precision(path: Path, precision: str, info: ModelInfo, folder: str | Path | None,
                    progress: Callable[[str], None] = lambda step: None) -> Change:
    """Replaces the float32 file at `path` by one of `precision`, "float16" or "int8"; inputs and outputs stay float32.

    `folder` holds the user's pictures: every other one, up to 128, calibrates int8, which cannot do without, and the others
    measure the change. Pictures in folders that are named after the model's classes are labelled.

    Raises InputError for a folder without enough pictures, or none where one is needed, or one for a network that does not name
    classes; ExportError if ONNX Runtime does not run the file.
    """
    if folder is not None and info.task != "classification":
        raise InputError(f"pictures calibrate and measure networks that name classes, and {info.name} does not")
    pictures = check_pictures(precision, folder)
    lower = path.with_name("lower.onnx")
    progress(f"converting to {precision}")
    if precision == "float16":
        _to_float16(path, lower)
    else:
        _to_int8(path, lower, info, pictures[::2][:CALIBRATED])
    progress("comparing")
    change = _compare(path, lower, info, pictures[1::2])
    lower.replace(path)
    return change


def check_pictures(precision: str, folder: str | Path | None) -> list[Path]:
    """The pictures below `folder`. Raises InputError if there are too few, or none where one is needed."""
    if folder is None:
        if precision == "int8":
            raise InputError("int8 has to be calibrated: give a folder of pictures")
        return []
    pictures = find_pictures([folder])
    if len(pictures) < 2:
        raise InputError(f"{folder} holds one picture; one to calibrate with and another to measure with are needed")
    return pictures


def _to_float16(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.transformers import float16
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *FLOAT32_ONLY]
    converted = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=blocked)
    # Where several nodes in float32 share an input, each has got a cast of its own, all of one name.
    distinct = {tuple(node.output): node for node in reversed(converted.graph.node)}
    kept = [node for node in converted.graph.node if distinct[tuple(node.output)] is node]
    del converted.graph.node[:]
    converted.graph.node.extend(kept)
    onnx.save(converted, target)


def _to_int8(source: Path, target: Path, info: ModelInfo, pictures: list[Path]) -> None:
    import onnx
    from onnxruntime import quantization
    prepared = source.with_name("prepared.onnx")
    with _quiet():
        quantization.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        reader = cast(quantization.CalibrationDataReader, _Reader(_images(info, pictures)))  # all that is called is `get_next`
        quantization.quantize_static(prepared, target, reader, per_channel=True,
                                     activation_type=quantization.QuantType.QUInt8, op_types_to_quantize=list(ARITHMETIC))
    prepared.unlink()
    converted = onnx.load(target)
    del converted.metadata_props[:]
    converted.metadata_props.extend(onnx.load(source).metadata_props)
    onnx.save(converted, target)


class _Reader:
    """Pictures as onnxruntime's calibration asks for them."""

    def __init__(self, images: Iterator[np.ndarray]):
        self.images = images

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {INPUT: image}


def _images(info: ModelInfo, pictures: list[Path]) -> Iterator[np.ndarray]:
    transform = cast(Callable[[Image.Image], Tensor], timm.data.create_transform(**info.data_config, is_training=False))
    for path in pictures:
        yield transform(open_picture(path, info.input_size[0]))[None].numpy()


def _compare(before: Path, after: Path, info: ModelInfo, pictures: list[Path]) -> Change:
    sessions = [open_session(path) for path in (before, after)]
    expected, found = _outputs(sessions, info, _random_image(sessions[0], info))
    difference = float(np.abs(found - expected).max() / (expected.std() or 1.0))
    named = np.array([[out.argmax() for out in _outputs(sessions, info, image)] for image in _images(info, pictures)]).reshape(-1, 2)
    labels = np.array([info.classes.index(name) if (name := path.parent.name) in info.classes else -1 for path in pictures])
    change = Change(difference, len(pictures), int((named[:, 0] == named[:, 1]).sum()), int((labels >= 0).sum()))
    if not change.labelled:
        return change
    accuracies = 100 * (named == labels[:, None])[labels >= 0].mean(0)
    return replace(change, before=float(accuracies[0]), after=float(accuracies[1]))


def _outputs(sessions: list, info: ModelInfo, image: np.ndarray) -> list[np.ndarray]:
    try:
        return [session.run([info.output], {INPUT: image})[0].astype(np.float64) for session in sessions]
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise ExportError(f"ONNX Runtime does not run the converted model: {error}") from error


def _random_image(session, info: ModelInfo) -> np.ndarray:
    """Of the size and batch that the file takes."""
    shape = [n if isinstance(n, int) else own for n, own in zip(session.get_inputs()[0].shape, (1, *info.input_size), strict=True)]
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps onnxruntime's tools from giving advice through the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
