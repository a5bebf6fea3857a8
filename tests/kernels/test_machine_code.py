"""Kernels become machine code for every target, in a process of its own: here triton interprets."""
import importlib
import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.kernel_table import FILE, TRITON
from zoo.kernels import _launch
from zoo.kernels._backends import operators_with_kernels
from zoo.kernels._launch import digest
from zoo.kernels.machine_code import TARGETS, inner_loop_of_amdgcn, inner_loop_of_sass

COMPILE = """
import json, sys
from zoo.kernels.machine_code import TARGETS, compile_operator
print(json.dumps([[code.kernel, code.target.name, code.spilled, code.shared_memory, code.target.shared_memory, code.instructions]
                  for target in TARGETS for code in compile_operator(sys.argv[1], target, first=2)]))
"""

BATCHES = """
import json, torch
from zoo.kernels._launch import recording
from zoo.kernels.deform_conv2d.triton import deform_conv2d
from zoo.kernels.depthwise_dynamic_conv2d.triton import depthwise_dynamic_conv2d
from zoo.kernels.halo_attention.triton import halo_attention
from zoo.kernels.machine_code import specialization

compiled, every_batch = {}, (1, 2, 3, 15, 16, 48)
for batch in every_batch:
    with recording("sm_90") as launches:
        x, weight = (torch.zeros(batch, 6, *size, requires_grad=True) for size in ((5, 7), (3, 3)))
        depthwise_dynamic_conv2d(x, weight, None, False).square().sum().backward()
        deform_conv2d(x, torch.zeros(batch, 18, 5, 7), torch.zeros(4, 3, 3, 3, requires_grad=True), None, torch.zeros(batch, 9, 5, 7),
                      [1, 1], [1, 1], [1, 1]).square().sum().backward()
        maps = torch.zeros(batch, 5, 7, 1, 6, requires_grad=True)
        halo_attention(maps, maps, maps, *torch.zeros(2, 9, 6), 4, 1, 1.0)[0].square().sum().backward()
    for launch in launches:
        compiled.setdefault(launch.name, []).append(repr((specialization(launch), launch.configuration)))
print(json.dumps({name: [len(variants) // len(every_batch), len(set(variants))] for name, variants in compiled.items()}))
"""

LOADS = """
import json, re, torch
from zoo.kernels._launch import recording
from zoo.kernels.halo_attention import triton
from zoo.kernels.machine_code import TARGETS, compile_launch, dumped
from zoo.layers import HaloAttention, halo

halo.halo_attention = lambda q, k, v, *tables_block_halo_stride: triton.halo_attention(q, k, v, *tables_block_halo_stride[:4], 0.25)[0]
layer = HaloAttention(64, num_heads=4).bfloat16()
x = torch.zeros(1, 64, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)  # as a GPU's projections get it
with recording("sm_90") as launches:
    layer(x).square().sum().backward()
code = {launch.name: dumped(compile_launch(launch, TARGETS[1]), "--dump-sass") for launch in launches}
print(json.dumps({name: re.findall(r"LDG[A-Z]*[.][.A-Z0-9]*", lines) for name, lines in code.items()}))
"""


def answer(code, *arguments):
    """What Python prints where triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout)


def test_batches_of_other_sizes_compile_nothing_anew():
    found = answer(BATCHES)
    assert len(found) == 8
    for kernel, (a_batch, variants) in found.items():
        assert variants <= a_batch, f"{kernel} is compiled {variants} times"


def test_maps_of_halo_layers_are_read_in_wide_pieces():
    """128 bits at a time, in the loops over windows asynchronously; never a channel by itself."""
    loads = answer(LOADS)
    assert len(loads) == 3
    for kernel, found in loads.items():
        assert not [load for load in found if "U16" in load], kernel
        assert [load for load in found if "128" in load], kernel
    assert all(any(load.startswith("LDGSTS") for load in loads[f"halo_attention_{name}"]) for name in ("forward", "backward_queries"))


@pytest.mark.parametrize("operator", operators_with_kernels())
def test_kernels_compile_for_every_target(operator):
    compiled = answer(COMPILE, operator)
    assert {target for _, target, *_ in compiled} == {"sm_80", "sm_90", "gfx942"}
    counted = importlib.import_module(f"zoo.kernels.{operator}.triton").__dict__.get("IN_A_TURN", {})
    for kernel, target, spilled, shared_memory, limit, instructions in compiled:
        assert (instructions or 0) > 0 if kernel in counted else instructions is None
        assert spilled == 0, f"{kernel} on {target} spills {spilled} bytes of registers"
        assert shared_memory <= limit, f"{kernel} on {target} takes {shared_memory} of {limit} bytes of shared memory"


@pytest.mark.parametrize("operator", operators_with_kernels())
def test_table_shows_these_kernels_without_spills_within_limits(operator):
    """That of the Triton that is installed; each has its own."""
    section = FILE.read_text().partition(f"\n## {operator}\n")[2].partition("\n## ")[0]
    assert f"`{digest(operator)}`" in section, f"kernels changed: run python -m benchmarks.kernel_table {operator} with Triton {TRITON}"
    rows = re.findall(r"\| (\d+) \| (\d+) \| ([\d.]+) of (\d+) \|", section)
    assert len(rows) >= 3
    assert all(spilled == "0" and float(taken) <= int(limit) for _, spilled, taken, limit in rows)


def test_instructions_of_the_longest_innermost_loop_are_counted():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;     /* 0x00000a0000017a02 */
                                                              /* 0x000fc40000000f00 */
        /*0010*/                   IADD3 R0, R1, 0x1, RZ ;    /* 0x1 */
        /*0020*/                   FADD R0, R1, R2 ;          /* 0x1 */
        /*0030*/                   FADD R0, R1, R2 ;          /* 0x1 */
        /*0040*/              @!P0 BRA 0x20 ;                 /* 0x1 */
        /*0050*/              @!UP1 BRA.U 0x0090 ;            /* 0x1 */
        /*0060*/                   FADD R0, R1, R2 ;          /* 0x1 */
        /*0070*/               @P1 BRA P2, 0x60 ;             /* 0x1 */
        /*0080*/               @P1 BRA 0x0010 ;               /* 0x1 */
        /*0090*/                   EXIT ;                     /* 0x1 */
        /*00a0*/                   BRA 0xa0;                  /* 0x1 */
"""
    assert inner_loop_of_sass(sass) == 3
    assert inner_loop_of_sass(sass.replace("BRA 0x20 ;", "BRA 0x80 ;")) == 2
    assert inner_loop_of_sass("/*0000*/ EXIT ;\n/*0010*/ BRA 0x10;") == 0
    amdgcn = """
\ts_mov_b32 s0, 0
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
\ts_mov_b32 s1, 0
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\t.loc\t1 42 12 is_stmt 1               ; triton.py:42:12
\tv_add_f32 v0, v0, v1
\ts_cbranch_execz .LBB0_4
; %bb.3:                                ;   in Loop: Header=BB0_2 Depth=2
\tv_add_f32 v0, v0, v1
.LBB0_4:                                ;   in Loop: Header=BB0_2 Depth=2
\ts_cbranch_scc1 .LBB0_2
; %bb.5:                                ;   in Loop: Header=BB0_1 Depth=1
\ts_cbranch_scc1 .LBB0_1
; %bb.6:
\ts_endpgm
"""
    assert inner_loop_of_amdgcn(amdgcn) == 4
    assert inner_loop_of_amdgcn("\ts_endpgm") == 0


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
