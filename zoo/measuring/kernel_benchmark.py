"""Kernels on the device at hand: tuned, and measured beside their rivals and against the floors of the hardware."""
import multiprocessing
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import Tensor

import zoo.kernels
from zoo.kernels import _launch
from zoo.kernels._launch import Configuration, overridden, recording

PASSES = ("forward", "forward + backward")
ROUNDS = 3  # that both sides take turns
GAIN = 0.03  # by which a configuration must be faster to be taken
TOLERANCE = 0.02  # of a tuned kernel's results, relative to the norm of those before


class Side(NamedTuple):
    """Something to time: a forward pass, and the tensors whose gradients its backward pass computes."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


class Case(NamedTuple):
    """One problem of one operator.

    Rivals compute what ours does, from leaves of the same values, in the same order; floors do a part of it that nobody can leave out.
    `moved` bytes and floating-point `operations` are the fewest possible, for each of PASSES.
    """

    operator: str
    name: str
    ours: Side
    rivals: dict[str, Side]
    moved: tuple[int, int]
    operations: tuple[int, int]
    floors: dict[str, Side] = {}  # noqa: RUF012  never changed


class Ceilings(NamedTuple):
    """What the device was measured to do: bytes and floating-point operations in a second."""

    bandwidth: float
    operations: float


class Row(NamedTuple):
    """A case in one pass. By the names of sides: seconds and bytes of memory, or why there are none."""

    case: str
    kind: str
    seconds: dict[str, float]
    memory: dict[str, int]
    failures: dict[str, str]
    floors: tuple[float, float]  # seconds to move the bytes, and to do the operations


Cases = Callable[[str, torch.dtype, bool], Iterator[Case]]


class Deadline:
    """Time that is running out, in all processes, so that late steps are left out rather than everything lost."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0


def ceilings(device: str, dtype: torch.dtype, small: bool) -> Ceilings:
    """Of a copy and of a matrix product."""
    a, b = torch.randn(2, *[256 if small else 8192] * 2, device=device).to(dtype).unbind()
    buffer = torch.empty((1 << 20) if small else (1 << 30), dtype=torch.uint8, device=device)
    other = torch.empty_like(buffer)
    return Ceilings(2 * buffer.numel() / seconds(lambda: other.copy_(buffer), device), 2 * len(a) ** 3 / seconds(lambda: a @ b, device))


def seconds(run: Callable[[], object], device: str, leaves: tuple[Tensor, ...] = ()) -> float:
    """Median, without what the caches hold of an earlier run."""
    if device != "cpu":
        from triton.testing import do_bench
        return cast(float, do_bench(run, warmup=10, rep=40, grad_to_none=leaves, return_mode="median")) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, device: str, limits: Ceilings) -> list[Row]:
    """Ours, every rival and every floor in turn, in both passes."""
    sides = {"ours": case.ours} | case.rivals | case.floors
    rows = []
    for kind, moved, operations in zip(PASSES, case.moved, case.operations, strict=True):
        runs, memory, failures = {}, {}, {}
        for name, side in sides.items():
            try:
                runs[name] = _pass(side, kind)
                memory[name] = _peak_memory(runs[name], device, side.leaves)
            except Exception as error:  # compilers, drivers and memory fail in many types; the other sides are still worth measuring
                failures[name] = reason(error)
                if device != "cpu":
                    torch.cuda.empty_cache()
        times = {name: [] for name in memory}
        for _ in range(ROUNDS if device != "cpu" else 1):
            for name in times:
                times[name].append(seconds(runs[name], device, sides[name].leaves))
        medians = {name: statistics.median(times[name]) for name in times}
        floors = moved / limits.bandwidth, operations / limits.operations
        rows.append(Row(f"{case.operator}, {case.name}", kind, medians, memory, failures, floors))
    return rows


def reason(error: Exception) -> str:
    """Why there is no number, for a cell of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return textwrap.shorten(f"failed: {type(error).__name__}: {error}".replace("|", "/"), 120, placeholder=" …")


def _pass(side: Side, kind: str) -> Callable[[], object]:
    if kind == "forward":
        return torch.no_grad()(side.run)
    with torch.no_grad():
        cotangent = torch.randn_like(side.run())
    return lambda: side.run().backward(cotangent)


def _peak_memory(run: Callable[[], object], device: str, leaves: tuple[Tensor, ...]) -> int:
    """Above what is held between passes, in bytes; also the first run, which compiles."""
    if device == "cpu":
        run()
        return 0
    run()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def table(rows: list[Row], limits: Ceilings) -> str:
    """As Markdown. Times are those of eager calls, with what Python and launches take where the device has to wait for them."""
    lines = [f"Copies move {limits.bandwidth / 1e12:.2f} TB/s here and matrix products do {limits.operations / 1e12:.0f} TFLOP/s; "
             "the floors are the times of the fewest bytes and operations at these rates.", "",
             "| case | pass | side | ms | side / ours | peak MiB | floors: bytes, operations, ms | side / higher floor |",
             "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        floors = ", ".join(f"{floor * 1e3:.3f}" for floor in row.floors)
        lines += [f"| {row.case} | {row.kind} | {name} | {why} | | | {floors} | |" for name, why in row.failures.items()]
        for name, time_taken in row.seconds.items():
            ratio = f"{time_taken / row.seconds['ours']:.2f}" if "ours" in row.seconds else ""
            lines.append(f"| {row.case} | {row.kind} | {name} | {time_taken * 1e3:.3f} | {ratio} | {row.memory[name] / 2**20:.1f} "
                         f"| {floors} | {time_taken / max(row.floors):.1f} |")
    return "\n".join(lines)


def tune(cases: list[Case], device: str, deadline: Deadline, compile_ahead: Callable[[list[tuple[int, str, Configuration]]], None],
         keep: Callable[[str, str, Configuration], None], progress: Callable[[str], None] = lambda step: None) -> None:
    """Finds the fastest configuration near the present one for every kernel and key in `cases`.

    `compile_ahead` is given (place of the case, kernel, configuration) of what is going to be timed; `keep` is given kernel,
    "architecture key" and configuration of each that is faster than the present one, as it is found.
    """
    kernels = {}  # (kernel, key) → the largest case, its pass and the present configuration
    for place, case in sorted(enumerate(cases), key=lambda entry: -entry[1].operations[0]):
        for kind in PASSES:
            with recording() as launches:
                _pass(case.ours, kind)()
            for launch in launches:
                kernels.setdefault((launch.name, launch.key), (place, kind, launch.configuration))
    compile_ahead([(place, name, chosen) for (name, _), (place, _, present) in kernels.items() for chosen in neighbours(present)])
    architecture = _launch.architecture(torch.device(device))
    for (name, key), (place, kind, present) in kernels.items():
        if deadline.over:
            progress("no time left to tune the rest")
            break
        best = _fastest(cases[place].ours, kind, name, key, present, device)
        progress(f"{name} {key}: {best}")
        if best != present:
            keep(name, f"{architecture} {key}".strip(), best)


def neighbours(chosen: Configuration) -> list[Configuration]:
    """Every entry halved or doubled; stages one more or less."""
    changed = []
    for name, value in chosen.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        changed += [chosen | {name: step} for step in steps if step >= 1]
    return changed


def _fastest(side: Side, kind: str, kernel: str, key: str, present: Configuration, device: str) -> Configuration:
    """Of `present` and its neighbours that run and give the same results, the fastest; `present` unless one gains more than GAIN."""
    def run() -> tuple[Tensor, ...]:
        out = side.run()
        return (out,) if kind == "forward" else (out, *torch.autograd.grad(out.float().square().sum(), side.leaves))

    with recording(launching=True) as launches:
        expected = run()
    launch = next(launch for launch in launches if (launch.name, launch.key) == (kernel, key))
    candidates = [present]
    for chosen in neighbours(present):
        with overridden(kernel, chosen):
            try:
                results = run()
            except Exception:  # what compilers and drivers refuse has many types
                continue
        if all(torch.dist(x.float(), y.float()) <= TOLERANCE * y.float().norm() for x, y in zip(results, expected, strict=True)):
            candidates.append(chosen)
    times = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for chosen, taken in zip(candidates, times, strict=True):
            taken.append(seconds(launch._replace(configuration=chosen).run, device))
    medians = [statistics.median(taken) for taken in times]
    best = min(range(len(candidates)), key=medians.__getitem__)
    return candidates[best] if medians[best] < (1 - GAIN) * medians[0] else present


def compile_in_processes(
    cases: Callable[[], list[Case]], workers: int, deadline: Deadline
) -> Callable[[list[tuple[int, str, Configuration]]], None]:
    """For `tune`: what is to be timed is compiled by many processes, and found in Triton's cache after that."""
    def compile_ahead(wanted: list[tuple[int, str, Configuration]]) -> None:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(_compile, cases, wanted[i::workers], deadline) for i in range(workers)]:
                done.exception()  # a compiler that takes its process down: what is missing is compiled when it is timed

    return compile_ahead


def _compile(cases: Callable[[], list[Case]], wanted: list[tuple[int, str, Configuration]], deadline: Deadline) -> None:
    built = cases()
    for place, kernel, chosen in wanted:
        if deadline.over:
            return
        with overridden(kernel, chosen):
            try:
                _pass(built[place].ours, PASSES[1])()
            except Exception:  # noqa: S112  timed again, and left out, by `tune`
                continue


def training_throughput(model: str, backend: str | None, device: str, batch: int, size: int | None, steps: int) -> float:
    """Images per second through forward, backward and an SGD step under bfloat16 autocast.

    `backend` is that of the operators, see `zoo.kernels.default_backend`.
    """
    network = timm.create_model(model, num_classes=1000).to(device).train()
    size = size or cast(int, cast(dict[str, Any], network.pretrained_cfg)["input_size"][1])
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    with zoo.kernels.default_backend(backend):
        for _ in range(min(steps, 3)):
            step()
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
    return steps * batch / (time.perf_counter() - start)
