"""Kernels become machine code for every target, in a process of its own: here triton interprets."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.kernels import _launch
from zoo.kernels._backends import operators_with_kernels
from zoo.kernels._launch import digest
from zoo.kernels.machine_code import TARGETS

TABLE = Path(__file__).parents[2] / "benchmarks" / "kernels_machine_code.md"
COMPILE = """
import json, sys
from zoo.kernels.machine_code import TARGETS, compile_operator
print(json.dumps([[code.kernel, code.target.name, code.spilled, code.shared_memory, code.target.shared_memory]
                  for target in TARGETS for code in compile_operator(sys.argv[1], target, first=2)]))
"""


@pytest.mark.parametrize("operator", operators_with_kernels())
def test_kernels_compile_for_every_target(operator):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE, operator], capture_output=True, text=True, check=True, env=environment)
    compiled = json.loads(run.stdout)
    assert {target for _, target, *_ in compiled} == {"sm_80", "sm_90", "gfx942"}
    for kernel, target, spilled, shared_memory, limit in compiled:
        assert spilled == 0, f"{kernel} on {target} spills {spilled} bytes of registers"
        assert shared_memory <= limit, f"{kernel} on {target} takes {shared_memory} of {limit} bytes of shared memory"


@pytest.mark.parametrize("operator", operators_with_kernels())
def test_table_shows_these_kernels_without_spills_within_limits(operator):
    section = TABLE.read_text().partition(f"\n## {operator}\n")[2].partition("\n## ")[0]
    assert f"`{digest(operator)}`" in section, f"kernels changed: run python -m benchmarks.kernel_table {operator}"
    rows = re.findall(r"\| (\d+) \| (\d+) \| ([\d.]+) of (\d+) \|", section)
    assert len(rows) >= 3
    assert all(spilled == "0" and float(taken) <= int(limit) for _, spilled, taken, limit in rows)


def test_every_configuration_is_compiled_as_proof():
    compiled = set()
    for operator in operators_with_kernels():
        for _, run in importlib.import_module(f"zoo.kernels.{operator}.triton").compiled_variants():
            for target in TARGETS:
                with _launch.recording(target.name) as launches:
                    run()
                compiled |= {(launch.name, _launch.entry(launch.name, target.name, launch.key)) for launch in launches}
    configurations = json.loads(_launch.CONFIGURATIONS.read_text())
    tuned = {(kernel, name) for kernel, entries in configurations.items() for name in entries if name.startswith("sm_")}  # on hardware
    assert {(kernel, name) for kernel, entries in configurations.items() for name in entries} - tuned <= compiled
