"""Kernels on the device at hand: tuned, and measured beside their rivals and against the floors of the hardware."""
import itertools
import math
import multiprocessing
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, cast

import torch
from torch import Tensor

import zoo.kernels
from zoo.kernels._launch import Configuration, Launch, overridden, recording

PASSES = ("forward", "forward + backward")
ROUNDS = 3  # that both sides take turns
GAIN = 0.03  # by which a configuration must be faster to be taken
SIZES = {  # of tiles and programs that are tried
    "QUERIES": (16, 32, 64, 128), "KEYS": (16, 32, 64, 128), "PATCH": (4, 8), "POSITIONS": (16, 32, 64, 128, 256),
    "REGIONS": (16, 32, 64, 128, 256), "CHANNELS": (1, 4, 8, 16, 32, 64, 128),
    "OUTS": (16, 32, 64, 128), "TAPS": (1, 2, 4, 8, 16), "STEPS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)}
STAGES = (1, 2, 3, 4)
MOST_TILINGS, FINALISTS = 40, 3
FEWEST_NUMBERS, MOST_NUMBERS, SHARED_MEMORY = 1, 128, 160 << 10  # of a thread, float32 in registers; of a program, bytes
TILING_SHARE = 0.75  # of the time for tuning; the rest is for stages
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


class Tuned(NamedTuple):
    """A kernel and key: seconds with the configuration before and with the chosen one, and how many were tried."""

    kernel: str
    key: str
    before: float
    after: float
    tried: int
    chosen: Configuration


Wanted = tuple[int, str, Configuration]  # the place of a case, a kernel of its, and how it is to run
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


def seconds(run: Callable[[], object], device: str, leaves: tuple[Tensor, ...] = (), quick: bool = False) -> float:
    """Median, without what the caches hold of an earlier run."""
    if device != "cpu":
        from triton.testing import do_bench
        warmup, rep = (2, 8) if quick else (10, 40)  # milliseconds
        return cast(float, do_bench(run, warmup=warmup, rep=rep, grad_to_none=leaves, return_mode="median")) / 1e3
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


def tune(
    cases: list[Case], device: str, deadline: Deadline, compile_ahead: Callable[[list[Wanted], Deadline], None],
    keep: Callable[[Tuned], None], progress: Callable[[str], None] = lambda step: None,
) -> None:
    """Finds the fastest tiles and warps, then the fastest number of stages, for every kernel and key in `cases`.

    `compile_ahead` is given what is going to be timed; `keep` every kernel and key once it has been, in either turn.
    """
    kernels = {}  # (kernel, key) → the largest case, its pass and the present configuration
    for place, case in sorted(enumerate(cases), key=lambda entry: -entry[1].operations[0]):
        for kind in PASSES:
            with recording() as launches:
                _pass(case.ours, kind)()
            for launch in launches:
                kernels.setdefault((launch.name, launch.key), (place, kind, launch.configuration))
    for grid, share in ((tilings, TILING_SHARE), (stages, 1.0)):
        turn = Deadline(share * deadline.left)
        wanted = {name_and_key: grid(name_and_key[1], present) for name_and_key, (*_, present) in kernels.items()}
        ranks = itertools.zip_longest(*([(kernels[entry][0], entry[0], chosen) for chosen in found] for entry, found in wanted.items()))
        compile_ahead([one for rank in ranks for one in rank if one is not None], Deadline(turn.left / 2))  # the best of all kernels first
        for number, ((name, key), (place, kind, present)) in enumerate(kernels.items()):
            if turn.over:
                progress("no time left to tune the rest")
                break
            own = Deadline(2 * turn.left / (len(kernels) - number))
            tuned = _fastest(cases[place].ours, kind, name, key, [present, *wanted[name, key]], device, own)
            progress(f"{name} {key}: {tuned.before * 1e6:.1f} → {tuned.after * 1e6:.1f} µs, {tuned.tried} tried, {tuned.chosen}")
            kernels[name, key] = place, kind, tuned.chosen
            keep(tuned)


def tilings(key: str, present: Configuration) -> list[Configuration]:
    """Tiles and warps that fit a program, those nearest to the present ones first."""
    names = [name for name in present if name in SIZES]
    found = (present | dict(zip(names, values, strict=True)) for values in itertools.product(*(SIZES[name] for name in names)))
    fitting = [chosen for chosen in found if chosen != present and _fits(key, chosen)]
    return sorted(fitting, key=lambda chosen: sum(abs(math.log2(chosen[name] / present[name])) for name in names))[:MOST_TILINGS]


def stages(key: str, present: Configuration) -> list[Configuration]:
    """How many tiles are on their way from memory."""
    return [present | {"num_stages": n} for n in STAGES if n != present["num_stages"] and _fits(key, present | {"num_stages": n})]


def _fits(key: str, chosen: Configuration) -> bool:
    """Whether the float32 tiles of a program are enough for its threads and not too many for their registers, and its shared memory holds
    what is on its way. An estimate, from the words of the key: the width of a head ("… 64") and of numbers ("16-bit")."""
    words = key.split()
    rows = chosen.get("QUERIES") or chosen.get("POSITIONS") or chosen.get("REGIONS") or chosen["STEPS"]
    columns = chosen.get("KEYS") or chosen.get("PATCH", 0) ** 2 or chosen.get("TAPS", 1) * chosen.get("CHANNELS", 1)
    depth = chosen.get("OUTS") or (int(words[-1]) if words and words[-1].isdigit() else 0)
    numbers = (rows * columns + rows * depth + columns * depth) / (32 * chosen["num_warps"])
    on_the_way = chosen["num_stages"] * min(rows, columns) * 2 * depth * (2 if "16-bit" in words else 4)
    return FEWEST_NUMBERS <= numbers <= MOST_NUMBERS and on_the_way <= SHARED_MEMORY


def _fastest(
    side: Side, kind: str, kernel: str, key: str, candidates: list[Configuration], device: str, deadline: Deadline
) -> Tuned:
    """The fastest of `candidates`, the first of which is the present one, that run and give its results.

    The present one unless another gains more than GAIN, when all that came close are timed in turn.
    """
    def run(chosen: Configuration) -> tuple[Launch, tuple[Tensor, ...]]:
        """The launch with buffers of its own, because how large they are may depend on tiles; and what comes of it."""
        with overridden(kernel, chosen), recording(launching=True) as launches:
            out = side.run()
            results = (out,) if kind == PASSES[0] else (out, *torch.autograd.grad(out.float().square().sum(), side.leaves))
        return next(launch for launch in launches if (launch.name, launch.key) == (kernel, key)), results

    present, expected = run(candidates[0])
    timed = [(seconds(present.run, device, quick=True), candidates[0])]
    for chosen in candidates[1:]:
        if deadline.over:
            break
        try:
            launch, results = run(chosen)
            if all(torch.dist(x.float(), y.float()) <= TOLERANCE * y.float().norm() for x, y in zip(results, expected, strict=True)):
                timed.append((seconds(launch.run, device, quick=True), chosen))
        except Exception:  # noqa: S112  what compilers and drivers refuse has many types
            continue
    finalists = [candidates[0], *(chosen for _, chosen in sorted(timed, key=lambda entry: entry[0])[:FINALISTS] if chosen != candidates[0])]
    launches, times = [run(chosen)[0] for chosen in finalists], [[] for _ in finalists]
    for _ in range(ROUNDS):
        for launch, taken in zip(launches, times, strict=True):
            taken.append(seconds(launch.run, device))
    medians = [statistics.median(taken) for taken in times]
    best = min(range(len(finalists)), key=medians.__getitem__)
    best = best if medians[best] < (1 - GAIN) * medians[0] else 0
    return Tuned(kernel, key, medians[0], medians[best], len(timed), finalists[best])


def compile_in_processes(cases: Callable[[], list[Case]], workers: int) -> Callable[[list[Wanted], Deadline], None]:
    """For `tune`: what is to be timed is compiled by many processes, and found in Triton's cache after that."""
    def compile_ahead(wanted: list[Wanted], deadline: Deadline) -> None:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(_compile, cases, wanted[i::workers], deadline) for i in range(workers)]:
                done.exception()  # a compiler that takes its process down: what is missing is compiled when it is timed

    return compile_ahead


def _compile(cases: Callable[[], list[Case]], wanted: list[Wanted], deadline: Deadline) -> None:
    built = cases()
    for place, kernel, chosen in wanted:
        if deadline.over:
            return
        with overridden(kernel, chosen):
            try:
                _pass(built[place].ours, PASSES[1])()
            except Exception:  # noqa: S112  timed again, and left out, by `tune`
                continue


def training_throughput(
    build: Callable[[], torch.nn.Module], backend: str | None, mode: str | None, device: str, batch: int, size: int, steps: int
) -> float:
    """Images per second through forward, backward and an SGD step under bfloat16 autocast.

    Args:
        backend: of the operators, see `zoo.kernels.default_backend`.
        mode: of `torch.compile`, around the whole network, in one graph; None for eager.
    """
    torch.compiler.reset()
    network = build().to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    if mode is None:
        compiled = network
    elif device == "cpu":  # a dry run: the graphs are the same, and are not compiled
        compiled = torch.compile(network, fullgraph=True, backend="eager")
    else:
        compiled = torch.compile(network, fullgraph=True, mode=mode)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(compiled(images), labels)
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
