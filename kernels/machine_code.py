"""What the kernels become on each target: compiled to machine code, which takes no GPU, and the resources read off it.

Instructions are counted in the disassembled code, in one turn of the inner loop: of the loops that hold no other the longest, from
where a branch jumps back to as far as that branch. Every warp of a program issues all of them, whatever of its threads is
masked, so a turn takes instructions · warps. That is divided by what a turn works out, which an operator's `triton.py` names for
each kernel: `IN_A_TURN = {"kernel": ("QUERIES", "KEYS")}` are the arguments, or sizes of its configuration, whose product it is.
Of attention these are scores, of other operators what is written beside `IN_A_TURN`. A warp is a wavefront on AMD's GPUs.
"""
import importlib
import itertools
import math
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
    instructions: float | None  # of a warp, for each score (see above); None without a loop or `IN_A_TURN`


def compile_operator(operator: str, target: Target, first: int | None = None) -> list[MachineCode]:
    """Every kernel of `zoo.kernels.<operator>` in the variants of its `compiled_variants`, all or the first ones."""
    module = importlib.import_module(f"zoo.kernels.{operator}.triton")
    compiled = []
    for variant, run in itertools.islice(module.compiled_variants(), first):
        with recording(target.name) as launches:
            run()
        compiled += [_compile(launch, variant, target, getattr(module, "IN_A_TURN", {}).get(launch.name)) for launch in launches]
    return compiled


def table(compiled: list[MachineCode]) -> str:
    """As Markdown, kernel by kernel."""
    lines = ["| kernel | variant | target | configuration | registers | spilled, bytes | shared memory, KiB | instructions |",
             "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for code in sorted(compiled, key=lambda code: (code.kernel, code.variant)):
        chosen = ", ".join(f"{name} {value}" for name, value in code.configuration.items())
        instructions = "–" if code.instructions is None else f"{code.instructions:.3f}"
        lines.append(f"| `{code.kernel}` | {code.variant} | {code.target.name} | {chosen} | {code.registers} | {code.spilled} "
                     f"| {code.shared_memory / 1024:.1f} of {code.target.shared_memory >> 10} | {instructions} |")
    return "\n".join(lines)


def _compile(launch: Launch, variant: str, target: Target, in_a_turn: tuple[str, ...] | None) -> MachineCode:
    compiled, given = compile_launch(launch, target), launch.arguments | launch.configuration
    registers, spilled, turn = (_amd if target.gpu.backend == "hip" else _nvidia)(compiled)
    per_score = turn * given["num_warps"] / math.prod(given[name] for name in in_a_turn) if turn and in_a_turn else None
    return MachineCode(launch.name, variant, target, launch.configuration, registers, spilled, compiled.metadata.shared, per_score)


def compile_launch(launch: Launch, target: Target) -> Any:
    """What Triton makes of it for this target."""
    kernel = launch.kernel
    types, constants, aligned = specialization(launch)
    source = ASTSource(
        kernel, dict(zip(kernel.arg_names, types, strict=True)), constexprs={(i,): value for i, value in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = OPTIONS | {name: value for name, value in launch.configuration.items() if name not in kernel.arg_names}
    return triton.compile(source, target=target.gpu, options=options)


def specialization(launch: Launch) -> tuple[tuple[str, ...], tuple[tuple[int, Any], ...], tuple[int, ...]]:
    """What a kernel is compiled for: types of its arguments, values of constants, and which arguments 16 divides, by their places.

    Launches that differ in it are compiled one by one.
    """
    given = launch.arguments | launch.configuration
    arguments = [(given[name], parameter) for name, parameter in zip(launch.kernel.arg_names, launch.kernel.params, strict=True)]
    types = tuple(_type(value, parameter) for value, parameter in arguments)
    constants = tuple((i, value) for i, (value, _) in enumerate(arguments) if types[i] == "constexpr")
    return types, constants, tuple(i for i, argument in enumerate(arguments) if types[i] != "constexpr" and _aligned(*argument))


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


def _nvidia(compiled: Any) -> tuple[int, int, int]:
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", dumped(compiled, "--dump-resource-usage"))[0]
    return int(registers), int(stack), inner_loop_of_sass(dumped(compiled, "--dump-sass"))


def dumped(compiled: Any, option: str) -> str:
    """What NVIDIA's cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def inner_loop_of_sass(code: str) -> int:
    """Instructions of the longest innermost loop, 0 where there is none."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?\w+ +)?(\w+)[^;]*?(?:0x([0-9a-f]+))? *;", code)
    index = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    jumps = [(index[int(to, 16)], i) for i, (_, name, to) in enumerate(found) if name == "BRA" and to]
    loops = {(first, last) for first, last in jumps if first < last}  # what jumps to itself is the end
    innermost = [loop for loop in loops if not any(loop[0] <= first and last <= loop[1] for first, last in loops - {loop})]
    return max((last - first + 1 for first, last in innermost), default=0)


def _amd(compiled: Any) -> tuple[int, int, int]:
    code = compiled.asm["amdgcn"]
    counts = {name: int(count) for name, count in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", code)}
    return counts["vgpr_count"], counts["private_segment_fixed_size"], inner_loop_of_amdgcn(code)


def inner_loop_of_amdgcn(code: str) -> int:
    """As `inner_loop_of_sass`, by what the compiler notes at the head of each block, as blocks of a loop need not lie together."""
    blocks = re.split(r"^(?=\.LBB\w+:|; %bb\.\d+:)", code, flags=re.MULTILINE)
    counts = {block[2:].partition(":")[0]: 0 for block in blocks if "This Inner Loop Header" in block}
    for block in blocks:
        loop = re.search(r"in Loop: Header=(BB\w+)", block) or re.match(r"\.L(BB\w+):", block)
        if loop and loop[1] in counts:
            counts[loop[1]] += len(re.findall(r"^\t[a-z]", block, flags=re.MULTILINE))
    return max(counts.values(), default=0)
