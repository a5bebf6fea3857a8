"""Exported models in float16 and int8, by ONNX Runtime's own tools, and what that changes."""
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm.data

from zoo.checkpoints import ModelInfo
from zoo.errors import InputError
from zoo.export import INPUT, open_session
from zoo.predict import find_pictures, open_picture

PRECISIONS = ("float32", "float16", "int8")
FLOAT32_ONLY = ("DeformConv", "GridSample")  # ONNX Runtime has no other kernels of them on the CPU
ARITHMETIC = ("Conv", "Gemm", "MatMul")  # what int8 makes faster; the rest stays as it is
CALIBRATED = 128  # pictures at most


@dataclass(frozen=True)
class Change:
    """On how many pictures the two files were compared, on how many they name the same class, and, where the pictures are
    labelled, the accuracy of either, in per cent."""

    pictures: int
    same: int
    before: float | None
    after: float | None


def lower_precision(path: Path, precision: str, info: ModelInfo, folder: str | Path | None,
                    progress: Callable[[str], None] = lambda step: None) -> Change | None:
    """Replaces the float32 file at `path` by one of `precision`, "float16" or "int8"; inputs and outputs stay float32.

    `folder` holds the user's pictures: every other one, up to 128, calibrates int8, which cannot do without, and the others
    measure the change (None without a folder). Pictures in folders that are named after the model's classes are labelled.

    Raises InputError for a folder without enough pictures, or none where one is needed, or one for a network that does not name classes.
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
    change = None
    if pictures:
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
    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=blocked), target)


def _to_int8(source: Path, target: Path, info: ModelInfo, pictures: list[Path]) -> None:
    import onnx
    from onnxruntime import quantization
    prepared = source.with_name("prepared.onnx")
    with _quiet():
        quantization.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(prepared, target, _Reader(_images(info, pictures)), per_channel=True,
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
    transform = timm.data.create_transform(**info.data_config, is_training=False)
    for path in pictures:
        yield transform(open_picture(path, info.input_size[0]))[None].numpy()


def _compare(before: Path, after: Path, info: ModelInfo, pictures: list[Path]) -> Change:
    sessions = [open_session(path) for path in (before, after)]
    named = np.array([[int(session.run([info.output], {INPUT: image})[0].argmax()) for session in sessions]
                      for image in _images(info, pictures)])
    same = int((named[:, 0] == named[:, 1]).sum())
    labels = [path.parent.name for path in pictures]
    if not set(labels) <= set(info.classes):
        return Change(len(pictures), same, None, None)
    correct = named == np.array([info.classes.index(label) for label in labels])[:, None]
    return Change(len(pictures), same, *(100 * correct.mean(0)).tolist())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps onnxruntime's tools from giving advice through the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
