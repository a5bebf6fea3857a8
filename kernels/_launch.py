"""Launches Triton kernels with the committed configurations, or notes what would be launched.

A configuration holds what a kernel does not compute with: its tile sizes, `num_warps`, `num_stages`. `configurations.json`
has them for every kernel under "default", under beginnings of a key that the operator makes of its problem ("packed",
"packed 16-bit 64"), and under an architecture and that key ("sm_90 packed 16-bit 64"); the most specific one is taken.
`make gpu` measures and writes the latter.
"""
import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._interpreter import correct_products

CONFIGURATIONS = Path(__file__).with_name("configurations.json")
OPTIONS = {"enable_fp_fusion": True}  # multiply and add in one step, whatever Triton's default
Configuration = dict[str, int]


class Launch(NamedTuple):
    """A kernel as it was, or would have been, launched."""

    kernel: Any
    grid: Callable[[dict[str, Any]], tuple[int, ...]]
    key: str
    arguments: dict[str, Any]
    configuration: Configuration

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def run(self) -> None:
        device = _device_of(self.arguments)
        if device.type == "cpu":
            correct_products()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.configuration, **OPTIONS)


# Plain globals, as the backend is: the backward pass launches in autograd's own thread.
_recorded: list[Launch] | None = None
_launching = True
_target: str | None = None
_overridden: dict[str, Configuration] = {}


def launch(kernel: Any, grid: Callable[[dict[str, Any]], tuple[int, ...]], key: str = "", /, **arguments: Any) -> None:
    """Runs `kernel` on the device of its tensors.

    Args:
        grid: number of programs, from all arguments and the configuration.
        key: what of the problem decides on the configuration: words, the most important first.
        arguments: of the kernel, except those that the configuration holds.
    """
    wanted = Launch(kernel, grid, key, arguments, configuration_of(kernel, _device_of(arguments), key))
    if _recorded is not None:
        _recorded.append(wanted)
    if _launching:
        wanted.run()


def _device_of(arguments: dict[str, Any]) -> torch.device:
    return next(value.device for value in arguments.values() if isinstance(value, Tensor))


def float32_precision(device: torch.device) -> str:
    """Of products of float32 matrices, `input_precision` of `tl.dot`: that of float32, or tf32 where torch has been told so.

    NVIDIA's matrix units reach it with three products in tf32, AMD's have float32.
    """
    target = _target or architecture(device)
    if not target.startswith(("sm_", "gfx942")):  # other AMD GPUs have no tf32
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":  # whichever of its interfaces torch was told by
        return "tf32"
    return "tf32x3" if target.startswith("sm_") else "ieee"


def configuration_of(kernel: Any, device: torch.device, key: str = "") -> Configuration:
    """What `launch` takes."""
    return configuration(kernel.fn.__name__, _target or architecture(device), key)


def configuration(kernel: str, architecture: str, key: str) -> Configuration:
    return _overridden.get(kernel) or _configurations()[kernel][entry(kernel, architecture, key)]


def entry(kernel: str, architecture: str, key: str) -> str:
    """The name under which the file has the configuration."""
    names, words = _configurations()[kernel], key.split()
    candidates = [" ".join([architecture, *words]), *(" ".join(words[:n]) for n in range(len(words), 0, -1)), "default"]
    return next(name for name in candidates if name in names)


def digest(operator: str) -> str:
    """Of the kernels of `zoo.kernels.<operator>` and their configurations: changes when their machine code may."""
    source = CONFIGURATIONS.parent.joinpath(operator, "triton.py").read_text()
    if "from .._tiles" in source:
        source += CONFIGURATIONS.with_name("_tiles.py").read_text()
    chosen = {kernel: entries for kernel, entries in _configurations().items() if f"def {kernel}(" in source}
    return hashlib.sha256((source + json.dumps(chosen, sort_keys=True)).encode()).hexdigest()[:16]


@contextlib.contextmanager
def recording(target: str | None = None, launching: bool = False) -> Iterator[list[Launch]]:
    """Launches inside are listed, as for `target` ("sm_90") or else for the device of the tensors, and only done if `launching`."""
    global _recorded, _launching, _target  # noqa: PLW0603  seen by every thread, see above
    before = _recorded, _launching, _target
    _recorded, _launching, _target = [], launching, target
    try:
        yield _recorded
    finally:
        _recorded, _launching, _target = before


@contextlib.contextmanager
def overridden(kernel: str, chosen: Configuration) -> Iterator[None]:
    """The kernel of this name runs with this configuration inside."""
    _overridden[kernel] = chosen
    try:
        yield
    finally:
        del _overridden[kernel]


@functools.cache
def _configurations() -> dict[str, dict[str, Configuration]]:
    return json.loads(CONFIGURATIONS.read_text())


def add_configurations(found: dict[str, dict[str, Configuration]]) -> None:
    """Writes these, by kernel and key, into the file beside those it has."""
    table = {kernel: entries | found.get(kernel, {}) for kernel, entries in _configurations().items()}
    kernels = []
    for kernel, entries in sorted(table.items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(chosen)}" for key, chosen in entries.items()]
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    written = CONFIGURATIONS.with_suffix(".tmp")
    written.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    written.replace(CONFIGURATIONS)
    _configurations.cache_clear()


@functools.cache
def architecture(device: torch.device) -> str:
    """As GPU compilers call it: sm_90, gfx942; cpu for the interpreter."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}" if torch.version.hip is None else properties.gcnArchName.partition(":")[0]
