"""What the kernels become on each target: compiled to machine code, which takes no GPU, and the resources read off it."""
import importlib
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelParam

from ._launch import OPTIONS, Launch, recording

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Target(NamedTuple):
    name: str
    gpu: GPUTarget
    shared_memory: int  # bytes that one program can have at most


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 163 << 10),
    Target("sm_90", GPUTarget("cuda", 90, 32), 227 << 10),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10),
)


class MachineCode(NamedTuple):
    """One kernel compiled for one target."""

    kernel: str
    variant: str
    target: Target
    configuration: dict[str, int]
    registers: int  # per thread
    spilled: int  # bytes of registers per thread that went to memory
    shared_memory: int  # bytes per program


def compile_operator(operator: str, target: Target, first: int | None = None) -> list[MachineCode]:
    """Every kernel of `zoo.kernels.<operator>` in the variants of its `compiled_variants`, all or the first ones."""
    module = importlib.import_module(f"zoo.kernels.{operator}.triton")
    compiled = []
    for variant, run in itertools.islice(module.compiled_variants(), first):
        with recording(target.name) as launches:
            run()
        compiled += [_compile(launch, variant, target) for launch in launches]
    return compiled


def table(compiled: list[MachineCode]) -> str:
    """As Markdown, kernel by kernel."""
    lines = ["| kernel | variant | target | configuration | registers | spilled, bytes | shared memory, KiB |",
             "| --- | --- | --- | --- | ---: | ---: | ---: |"]
    for code in sorted(compiled, key=lambda code: (code.kernel, code.variant)):
        chosen = ", ".join(f"{name} {value}" for name, value in code.configuration.items())
        lines.append(f"| `{code.kernel}` | {code.variant} | {code.target.name} | {chosen} | {code.registers} | {code.spilled} "
                     f"| {code.shared_memory / 1024:.1f} of {code.target.shared_memory >> 10} |")
    return "\n".join(lines)


def _compile(launch: Launch, variant: str, target: Target) -> MachineCode:
    kernel = launch.kernel
    values = [(launch.arguments | launch.configuration)[name] for name in kernel.arg_names]
    types = [_type(value, parameter) for value, parameter in zip(values, kernel.params, strict=True)]
    aligned = [i for i, value in enumerate(values) if types[i] != "constexpr" and _aligned(value, kernel.params[i])]
    source = ASTSource(
        kernel, dict(zip(kernel.arg_names, types, strict=True)),
        constexprs={(i,): value for i, (value, kind) in enumerate(zip(values, types, strict=True)) if kind == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = OPTIONS | {name: value for name, value in launch.configuration.items() if name not in kernel.arg_names}
    compiled = triton.compile(source, target=target.gpu, options=options)
    registers, spilled = (_amd if target.gpu.backend == "hip" else _nvidia)(compiled)
    return MachineCode(launch.name, variant, target, launch.configuration, registers, spilled, compiled.metadata.shared)


def _type(value: Any, parameter: KernelParam) -> str:
    """Of a kernel's argument, as Triton specializes on it when it launches."""
    if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(value: Any, parameter: KernelParam) -> bool:
    return isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and not parameter.do_not_specialize)


def _nvidia(compiled: Any) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return int(registers), int(stack)


def _amd(compiled: Any) -> tuple[int, int]:
    counts = {name: int(count) for name, count in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"])}
    return counts["vgpr_count"], counts["private_segment_fixed_size"]
