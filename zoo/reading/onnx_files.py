"""ONNX files that `zoo export` wrote: what ONNX Runtime makes of them, and what they say of themselves."""
import json
from pathlib import Path
from typing import Any

import torch

from zoo.errors import InputError, near_misses, require

ONNX_SUFFIX = ".onnx"


def open_session(path: str | Path) -> Any:
    """ONNX Runtime's session of the file, on the CPU with as many threads as torch has.

    Raises InputError for a file that is not there, or that it cannot load.
    """
    require("running ONNX files", "export", "onnxruntime")
    import onnxruntime
    path = Path(path)
    if not path.is_file():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"there is no ONNX file {path}{near_misses(path.name, others)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it says about failures comes with the exception as well
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise InputError(f"ONNX Runtime does not load {path}, which is damaged or no ONNX file: {' '.join(str(error).split())}") from error


def read_metadata(session: Any, path: str | Path) -> dict[str, Any]:
    """What the file says of itself, see docs/guides/exporting.md. Raises InputError for a file that `zoo export` did not write."""
    try:
        said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    except ValueError as error:
        raise InputError(f"{path} is no ONNX file of `zoo export`: its metadata are no JSON: {error}") from error
    if missing := [key for key in ("task", "model", "classes", "input_size") if key not in said]:
        raise InputError(f"{path} is no ONNX file of `zoo export`, or one of an older version: its metadata lack {', '.join(missing)}; "
                         "export the checkpoint again")
    return said
