"""Compiles the Triton kernels for every target, which takes no GPU, and writes what machine code they became."""
import argparse
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

from zoo.errors import InputError, near_misses
from zoo.files import check_writable, replacing
from zoo.kernels._backends import operators_with_kernels
from zoo.kernels._launch import digest
from zoo.kernels.machine_code import TARGETS, compile_operator, table
from zoo.tools._cli import run

TRITON = ".".join(triton.__version__.split(".")[:2])  # versions of which make other machine code
FILE = Path(__file__).resolve().parents[1] / "benchmarks" / f"kernels_machine_code_triton_{TRITON}.md"
HEAD = f"""# The kernels' machine code, by Triton {TRITON}

Written by `python -m benchmarks.kernel_table`: every kernel in its default configurations, compiled for NVIDIA's A100 (sm_80) and
H100 (sm_90) and AMD's MI300 (gfx942). Registers and spilled bytes are those of one thread, shared memory that of one program.
Instructions are those that a warp issues in the inner loop, divided by the scores of attention that the program works out meanwhile;
of other operators, by what their `IN_A_TURN` says.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_table", description=__doc__,
                                     epilog="example: python -m benchmarks.kernel_table routing_attention")
    parser.add_argument("operators", nargs="*", metavar="operator", help="compile only these (default: those changed since the last time)")
    parser.add_argument("--file", type=Path, default=FILE, help="the Markdown file (default: %(default)s)")
    args = parser.parse_args(arguments)
    known = operators_with_kernels()
    for name in args.operators:
        if name not in known:
            raise InputError(f"no operator {name!r} has kernels{near_misses(name, known)}; {', '.join(known)} have")
    check_writable(args.file)
    sections = read(args.file) if args.file.exists() else {}
    changed = args.operators or [name for name in known if f"`{digest(name)}`" not in sections.get(name, "")]
    with ProcessPoolExecutor() as pool:
        running = {name: [pool.submit(compile_operator, name, target) for target in TARGETS] for name in changed}
        for name, parts in running.items():
            sections[name] = f"Kernels and configurations `{digest(name)}`.\n\n{table([code for part in parts for code in part.result()])}"
            print(f"compiled {name}", flush=True)
    with replacing(args.file) as written:
        written.write_text(HEAD + "".join(f"\n## {name}\n\n{sections[name]}\n" for name in known if name in sections))
    print(f"wrote {args.file}")


def read(file: Path) -> dict[str, str]:
    """The sections by operator."""
    parts = re.split(r"^## (\w+)$", file.read_text(), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


if __name__ == "__main__":
    run(main)
