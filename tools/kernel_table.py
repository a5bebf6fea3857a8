"""Compiles every Triton kernel for every target, which takes no GPU, and writes what machine code they became."""
import argparse
from pathlib import Path

from zoo.cli import run
from zoo.files import check_writable, replacing

HEAD = """# The kernels' machine code

Written by `python tools/kernel_table.py`: every kernel in its default configuration, compiled for NVIDIA's A100 (sm_80) and
H100 (sm_90) and AMD's MI300 (gfx942). Registers and spilled bytes are those of one thread, shared memory that of one program."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/kernel_table.py")
    parser.add_argument("file", type=Path, nargs="?", default=Path("benchmarks/kernels_machine_code.md"),
                        help="the Markdown file to write (default: benchmarks/kernels_machine_code.md)")
    args = parser.parse_args(arguments)
    check_writable(args.file)
    from zoo.kernels._backends import operators_with_kernels
    from zoo.kernels.machine_code import compile_operator, table

    sections = [HEAD]
    for operator in operators_with_kernels():
        print(f"{operator} …", flush=True)
        sections.append(f"## {operator}\n\n{table(list(compile_operator(operator)))}")
    with replacing(args.file) as written:
        written.write_text("\n\n".join(sections) + "\n")
    print(f"wrote {args.file}")


if __name__ == "__main__":
    run(main)
