"""Every kernel becomes machine code for every target, in a process of its own: here triton interprets."""
import json
import os
import subprocess
import sys

import pytest

from zoo.kernels._backends import operators_with_kernels

COMPILE = """
import json, sys
from zoo.kernels.machine_code import compile_operator
print(json.dumps([[code.kernel, code.target.name, code.spilled, code.shared_memory, code.target.shared_memory]
                  for code in compile_operator(sys.argv[1])]))
"""


@pytest.mark.parametrize("operator", operators_with_kernels())
def test_default_configurations_fit_every_target(operator):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE, operator], capture_output=True, text=True, check=True, env=environment)
    compiled = json.loads(run.stdout)
    assert {target for _, target, *_ in compiled} == {"sm_80", "sm_90", "gfx942"}
    for kernel, target, spilled, shared_memory, limit in compiled:
        assert spilled == 0, f"{kernel} on {target} spills {spilled} bytes of registers"
        assert shared_memory <= limit, f"{kernel} on {target} takes {shared_memory} of {limit} bytes of shared memory"
