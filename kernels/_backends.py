"""Which implementation of an operator runs: its Triton kernels, or PyTorch.

Every public operator asks `use_triton`. Nothing here imports triton; operators do so when their kernels are to run.
"""
import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ._exporting import is_exporting

Backend = Literal["reference", "triton"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # of NVIDIA GPUs: bfloat16 and asynchronous copies
MOST_SAMPLES = 65535  # of a batch, which is the second or third axis of CUDA's grids

# A plain global, not a context variable: gradient checkpointing runs operators again in autograd's own thread.
_default: Backend | None = None


@contextlib.contextmanager
def default_backend(backend: Backend | None) -> Iterator[None]:
    """Operators called inside without a `backend` of their own, such as by layers, run this one. Not for several threads."""
    global _default  # noqa: PLW0603
    _check(backend, "default_backend")
    before, _default = _default, backend
    try:
        yield
    finally:
        _default = before


def use_triton(operator: str, backend: Backend | None, x: Tensor, unsupported: Callable[[], str | None] = lambda: None) -> bool:
    """Whether `operator` runs its Triton kernels on arguments of x's device and dtype.

    They run on CUDA and HIP tensors that they support, on CPU tensors only in Triton's interpreter and only when asked for.
    Exported graphs always hold the reference.

    Args:
        backend: the operator's argument; None for the choice of this machine.
        unsupported: says what else the kernels cannot do with the operator's arguments, as a clause. Not asked where it does not
            matter: of the free sizes of an exported graph it would make assumptions.

    Raises:
        ValueError: an unknown `backend`, or "triton" where it cannot run.
    """
    _check(backend, operator)
    backend = backend or _default
    if backend == "reference" or is_exporting():
        return False
    if backend is None and x.device.type != "cuda":
        return False
    reason = obstacle(x.device, x.dtype) or _too_many(x) or unsupported()
    if backend == "triton" and reason is not None:
        raise ValueError(f"{operator}: backend 'triton' cannot run here: {reason}")
    return reason is None


@torch.compiler.assume_constant_result
def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run on tensors of this device and dtype, as a clause; None where it can."""
    if dtype not in DTYPES:
        return f"the kernels take {', '.join(map(name_of, DTYPES))}, not {name_of(dtype)}"
    if not _installed():
        return "the package triton is not installed"
    if device.type == "cpu":
        return None if interpreted() else "on the CPU kernels run in Triton's interpreter only (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA or HIP device"
    if torch.version.hip is None and torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}, the kernels need {CAPABILITY}"
    return None


def _too_many(x: Tensor) -> str | None:
    return None if x.shape[0] <= MOST_SAMPLES else f"the kernels take at most {MOST_SAMPLES} samples, not {x.shape[0]}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operators_with_kernels() -> list[str]:
    """The folders of operators that hold Triton kernels."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py"))


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check(backend: str | None, operator: str) -> None:
    if backend not in (None, "reference", "triton"):
        raise ValueError(f"{operator}: backend must be None, 'reference' or 'triton', got {backend!r}")
