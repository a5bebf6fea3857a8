"""What a call of an operator's Triton path costs on the host, without a GPU: everything up to the CUDA driver, which is replaced.

The stub is the lowest there is: a library of the name libcuda.so.1 whose functions, cuLaunchKernelEx among them, return at once.
All above it is real: kernels compiled for sm_90 with their configurations of sm_90, Triton's launcher in Python and in C, which
unpacks every argument, torch's dispatcher, autograd and allocator. Nothing that is launched runs. Tensors are on the CPU, as no
CUDA runtime starts without a device: allocations cost what they cost there, and so does what PyTorch computes between launches, which
is small but not nothing (the two products of region_routes' gradient take 45 µs in bfloat16). What only CUDA tensors pass is left
out on all sides: the capability of the device, and the switch to it at every launch, which prepared launches leave out too. What only
CPU tensors pass, a look at the values of routes, is taken out.
Processor time is counted, because a shared machine lets processes wait.

    python -m benchmarks.host_time                      this checkout
    python -m benchmarks.host_time --before CHECKOUT    and another one, in turns; --write makes the table
"""
import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3  # in which checkouts take turns, each in a process of its own
SAMPLES, CALLS = 15, 60  # medians of so many samples of so many calls each
STUB = r"""
typedef unsigned long long u64;
int cuPointerGetAttribute(u64 *found, int attribute, u64 pointer) { *found = pointer; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 << 10; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
"""


def replace_driver() -> None:
    """Lets Triton find an sm_90 whose driver does nothing."""
    import triton
    folder = Path(tempfile.mkdtemp())
    source = Path(triton.__file__).parent.joinpath("backends/nvidia/driver.c").read_text()
    given = set(re.findall(r"\bcu\w+(?=\()", STUB))
    others = set(re.findall(r"\bcu[A-Z]\w+", source)) - given
    (folder / "stub.c").write_text(STUB + "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(others)))
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "stub.c"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

    triton.runtime.driver.set_active(Driver())


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


class Empty(torch.autograd.Function):
    """What autograd itself takes: allocations, and nothing else."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(*maps)
        return torch.empty_like(maps[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def cases() -> dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]]:
    """Operators on small maps, and SDPA."""
    from zoo import kernels
    routes = torch.arange(4).expand(1, 16, 4)
    (q, k, v), small = (leaf(1, 32, 32, 64) for _ in range(3)), [leaf(1, 8, 8, 64) for _ in range(3)]
    weights = leaf(1, 16, 4)
    halo = *(leaf(1, 8, 8, 1, 16) for _ in range(3)), *(leaf(21, 16) for _ in range(2))
    x, offset, weight, mask = leaf(1, 16, 8, 8), leaf(1, 18, 8, 8), leaf(16, 16, 3, 3), leaf(1, 9, 8, 8)
    kernel, theta = leaf(1, 16, 3, 3), leaf(16)
    tokens, pools = leaf(1, 7, 7, 32), leaf(1, 7, 7, 4)
    u, delta = (leaf(1, 16, 64).detach().transpose(1, 2).requires_grad_() for _ in range(2))
    b, c = (leaf(1, 16, 4, 16).detach().permute(0, 2, 3, 1).requires_grad_() for _ in range(2))
    scanned = u, delta, leaf(64, 16), b, c, leaf(64), leaf(64)
    queries, keys, values = (torch.randn(1, 2, 16, 32, requires_grad=True) for _ in range(3))

    def routed(q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
        return kernels.routing_attention(q, k, v, routes, (4, 4), 2, weights=weights, backend="triton")

    def attended(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        return kernels.halo_attention(q, k, v, rel_h, rel_w, 8, 3, backend="triton")

    found: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "routing_attention": (lambda: routed(q, k, v), (q, k, v)),
        "routing_attention, packed": (lambda: routed(*small), tuple(small)),
        "routing_attention, weighted": (lambda: routed(q, k, v, weights), (q, k, v, weights)),
        "region_means": (lambda: kernels.region_means(q, (4, 4), "triton"), (q,)),
        "region_routes": (lambda: kernels.region_routes(q, k, (4, 4), 4, "triton")[1], (q, k)),
        "halo_attention": (lambda: attended(*halo), halo),
        "deform_conv2d": (lambda: kernels.deform_conv2d(x, offset, weight, None, 1, 1, backend="triton"), (x, offset, weight)),
        "deform_conv2d, masked": (
            lambda: kernels.deform_conv2d(x, offset, weight, None, 1, 1, 1, mask, "triton"), (x, offset, weight, mask)),
        "depthwise_dynamic_conv2d": (
            lambda: kernels.depthwise_dynamic_conv2d(x, kernel, theta, "triton"), (x, kernel, theta)),
        "token_aware_avg_pool": (lambda: kernels.token_aware_avg_pool(tokens, pools, "triton"), (tokens, pools)),
        "selective_scan": (lambda: kernels.selective_scan(*scanned, delta_softplus=True, backend="triton"), scanned),
        "an empty autograd.Function": (lambda: cast(Tensor, Empty.apply(*small)), tuple(small)),
        "SDPA (torch, CPU)": (lambda: F.scaled_dot_product_attention(queries, keys, values), (queries, keys, values)),
    }
    return {name: case for name, case in found.items() if name != "selective_scan" or hasattr(kernels, name)}  # not in all checkouts


def measure() -> dict[str, tuple[float, float]]:
    """Microseconds of every case: forward without gradients, and forward and backward."""
    torch.set_num_threads(1)
    replace_driver()
    from zoo.kernels import _backends, _launch
    for operator in _backends.operators_with_kernels():
        __import__(f"zoo.kernels.{operator}.triton")  # for a GPU, before operators are told that the CPU will do
    _backends.interpreted = lambda: True
    _launch.architecture = lambda device: "sm_90"
    sys.modules["zoo.kernels.routing_attention"].__dict__["check_routes"] = lambda *arguments: None  # a look at values, on CPUs only
    found = {}
    for name, (run, leaves) in cases().items():
        with torch.no_grad():
            cotangent = torch.ones_like(run())

        def both(run=run, leaves=leaves, cotangent=cotangent) -> object:
            return torch.autograd.grad(run(), leaves, cotangent)

        found[name] = microseconds(torch.no_grad()(run)), microseconds(both)
    return found


def microseconds(run: Callable[[], object]) -> float:
    for _ in range(CALLS):
        run()
    samples = []
    for _ in range(SAMPLES):
        start = time.process_time()
        for _ in range(CALLS):
            run()
        samples.append((time.process_time() - start) / CALLS)
    return statistics.median(samples) * 1e6


def in_turns(checkouts: dict[str, Path]) -> dict[str, dict[str, list[float]]]:
    """By checkout and case the medians over all rounds."""
    rounds: dict[str, list[dict]] = {name: [] for name in checkouts}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for _ in range(ROUNDS):
        for name, path in checkouts.items():
            command = [sys.executable, __file__, "--once"]
            printed = subprocess.run(command, cwd=path, env=environment | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
                                     stdout=subprocess.PIPE, text=True, check=True).stdout
            rounds[name].append(json.loads(printed))
    return {name: {case: [statistics.median(one[case][i] for one in several) for i in range(2)] for case in several[0]}
            for name, several in rounds.items()}


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """As Markdown, checkouts side by side."""
    names = list(found)
    lines = ["| operator | " + " | ".join(f"{kind}, {name}" for kind in ("forward", "forward + backward") for name in names) + " |",
             "| --- |" + " ---: |" * (2 * len(names))]
    for case in found[names[-1]]:
        cells = []
        for i in range(2):
            times = {name: of[case][i] for name, of in found.items() if case in of}
            first = times.get(names[0])
            for name in names:
                share = "" if name == names[0] or first is None else f" ({times[name] / first:.2f})"
                cells.append(f"{times[name]:.0f}{share}" if name in times else "")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--write", action="store_true", help="writes benchmarks/host_time.md")
    parser.add_argument("--once", action="store_true", help="prints the numbers of one round as JSON")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure()))
        return
    checkouts = ({"before": args.before.resolve()} if args.before else {}) | {"now": ROOT}
    text = table(in_turns(checkouts))
    print(text)
    if args.write:
        import triton

        from zoo.measuring.model_benchmark import cpu_name
        commits = ", ".join(f"{name}: {_commit(path)}" for name, path in checkouts.items())
        ROOT.joinpath("benchmarks/host_time.md").write_text(
            "# Host time\n\nMicroseconds of processor time per call on the host, up to a CUDA driver that does nothing; in brackets the\n"
            "share of before; an empty Function is what autograd and the call of it take by themselves. By\n"
            f"`python -m benchmarks.host_time`, {time.strftime('%Y-%m-%d')}, {cpu_name()}, one thread, "
            f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}; {commits}.\n\n{text}\n")


def _commit(path: Path) -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=path, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
