"""Launches Triton kernels with the committed configurations, or notes what would be launched.

A configuration holds what a kernel does not compute with: its tile sizes, `num_warps`, `num_stages`. `configurations.json`
has them for every kernel under "default", under beginnings of a key that the operator makes of its problem ("packed",
"packed 16-bit 64"), and under an architecture and that key ("sm_90 packed 16-bit 64"); the most specific one is taken.
`make gpu` measures and writes the latter.
"""
import ast
import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._interpreter import correct_products
from ._remembering import remember

CONFIGURATIONS = Path(__file__).with_name("configurations.json")
OPTIONS = {"enable_fp_fusion": True}  # multiply and add in one step, whatever Triton's default
Configuration = dict[str, int]
Plan = TypeVar("Plan")


class Launch(NamedTuple):
    """A kernel as it was, or would have been, launched."""

    kernel: Any
    grid: tuple[int, ...]
    key: str
    arguments: dict[str, Any]
    configuration: Configuration

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def run(self) -> Any:
        """Returns what was compiled, or None of the interpreter."""
        device = _device_of(self.arguments)
        if device.type == "cpu":
            correct_products()
        with _on(device):
            return self.kernel[self.grid](**self.arguments, **self.configuration, **OPTIONS)


# Plain globals, as the backend is: the backward pass launches in autograd's own thread.
_recorded: list[Launch] | None = None
_launching = True
_target: str | None = None
_overridden: dict[str, Configuration] = {}
_plans: list[dict] = []  # of all operators


class Prepared:
    """A launch of a kernel on tensors of known shapes, strides, dtypes and device: all of it but their addresses.

    Triton's own launcher asks every argument anew what it is. Here only the addresses are asked whether 16 divides them, which is
    what a kernel is compiled for.
    """

    def __init__(
        self, kernel: Any, device: torch.device, grid: Callable[[Configuration], tuple[int, ...]], key: str, tensors: tuple[str, ...],
        **numbers: Any,
    ):
        """
        Args:
            grid: number of programs, from the configuration.
            key: what of the problem decides on the configuration: words, the most important first.
            tensors: the arguments of the kernel that calls give, in their order; None for one that there is not.
            numbers: its other arguments, except those that the configuration holds.
        """
        self._kernel, self._key, self._tensors, self._numbers = kernel, key, tensors, numbers
        self.configuration = configuration_of(kernel, device, key)
        programs = grid(self.configuration)
        self._grid = programs + (1,) * (3 - len(programs))
        self._device = device if device.type == "cuda" else None
        values = numbers | self.configuration
        self._values = [values.get(name) for name in kernel.arg_names]
        self._places = [kernel.arg_names.index(name) for name in tensors]
        self._compiled: dict[Any, Callable[..., None]] = {}  # by which addresses 16 divides; True: all

    def __call__(self, *tensors: Tensor | None) -> None:
        if _recorded is not None:
            launch = self._launch(tensors)
            _recorded.append(launch)
            if _launching:
                launch.run()
            return
        values, bits = self._values.copy(), 0
        for place, tensor in zip(self._places, tensors, strict=True):
            if tensor is not None:
                values[place] = address = tensor.data_ptr()
                bits |= address
        aligned = bits & 15 == 0 or tuple([(values[place] or 0) & 15 == 0 for place in self._places])
        run = self._compiled.get(aligned)
        if run is None:
            compiled = self._launch(tensors).run()
            if compiled is not None and torch.version.hip is None:  # on AMD it is also asked how large their storages are
                self._compiled[aligned] = compiled[self._grid]
        elif self._device is None or torch.cuda.current_device() == self._device.index:
            run(*values)
        else:
            with _on(self._device):
                run(*values)

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> Launch:
        arguments = self._numbers | dict(zip(self._tensors, tensors, strict=True))
        return Launch(self._kernel, self._grid, self._key, arguments, self.configuration)


def planned(build: Callable[..., Plan]) -> Callable[..., Plan]:
    """Keeps what `build` makes of its arguments, tensors and plain values, for others of the same shapes, strides, dtypes and device.

    What it makes must hold no tensor. Whatever changes configurations is heeded: nothing is kept or taken while launches are
    recorded or configurations overridden.
    """
    known: dict[Any, Plan] = {}
    _plans.append(known)

    @functools.wraps(build)
    def plan(*arguments: Any) -> Plan:
        if _recorded is not None or _overridden or _target is not None:
            return build(*arguments)
        return remember(known, arguments, _precision(arguments), build)

    return plan


def _precision(arguments: tuple) -> object:
    """What `float32_precision` depends on beside the device."""
    return torch.backends.cuda.matmul.fp32_precision if arguments[0].dtype is torch.float32 else None


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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
    """What is launched."""
    return configuration(kernel.fn.__name__, _target or architecture(device), key)


def configuration(kernel: str, architecture: str, key: str) -> Configuration:
    return _overridden.get(kernel) or _configurations()[kernel][entry(kernel, architecture, key)]


def entry(kernel: str, architecture: str, key: str) -> str:
    """The name under which the file has the configuration."""
    names, words = _configurations()[kernel], key.split()
    candidates = [" ".join([architecture, *words]), *(" ".join(words[:n]) for n in range(len(words), 0, -1)), "default"]
    return next(name for name in candidates if name in names)


def digest(operator: str) -> str:
    """Of the kernels of `zoo.kernels.<operator>` and their configurations: changes when their machine code may.

    That is with what is compiled, the constants, and the variants, but not with how launches are prepared.
    """
    source = CONFIGURATIONS.parent.joinpath(operator, "triton.py").read_text()
    if "from .._tiles" in source:
        source += CONFIGURATIONS.with_name("_tiles.py").read_text()
    counted = "\n".join(ast.unparse(part) for part in ast.parse(source).body if _is_compiled(part))
    chosen = {kernel: entries for kernel, entries in _configurations().items() if f"def {kernel}(" in source}
    return hashlib.sha256((counted + json.dumps(chosen, sort_keys=True)).encode()).hexdigest()[:16]


def _is_compiled(part: ast.stmt) -> bool:
    """Whether machine code may depend on this part of a module."""
    if isinstance(part, ast.FunctionDef):
        return part.name == "compiled_variants" or any(ast.unparse(mark) in ("kernel", "triton.jit") for mark in part.decorator_list)
    return isinstance(part, ast.Assign) and not ast.unparse(part.targets[0]).startswith("call")  # which are operators


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
    for plans in _plans:
        plans.clear()


@functools.cache
def architecture(device: torch.device) -> str:
    """As GPU compilers call it: sm_90, gfx942; cpu for the interpreter."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}" if torch.version.hip is None else properties.gcnArchName.partition(":")[0]
