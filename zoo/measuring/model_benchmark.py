"""Time and memory of models, side by side with rivals that compute the same.

The two take turns within each round (A B A B …), so that whatever else the machine does meets both; the ratio is
taken within rounds. What is freed stays with the process, as in a long training. Peak memory is that of tensors (torch's
allocator: activations, gradients, copies) above what is held between passes, in one pass of its own; scratch space inside
libraries is not counted.
"""
import ctypes
import datetime
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from zoo.checkpoints import load_model
from zoo.errors import InputError, near_misses
from zoo.measuring import DTYPES
from zoo.threads import torch_threads

FORWARD = "forward"
PASSES = (FORWARD, "forward + backward")


@dataclass(frozen=True)
class Side:
    """One model in one kind of pass: seconds of each round, peak memory in bytes."""

    seconds: tuple[float, ...]
    peak_memory: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """A model, and its rival if there is one, in one kind of pass: `forward` or `forward + backward`."""

    model: str
    kind: str
    ours: Side
    rival: Side | None

    @property
    def ratios(self) -> tuple[float, float, float]:
        """The quartiles over rounds of the rival's time over ours: above 1, ours is faster."""
        ratios = [rival / ours for ours, rival in zip(self.ours.seconds, cast(Side, self.rival).seconds, strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return lower, median, upper


@dataclass(frozen=True)
class Report:
    """What was compared, and where: `facts` are pairs of a name and a text."""

    facts: dict[str, str]
    comparisons: list[Comparison]

    def markdown(self) -> str:
        lines = [f"- {name}: {fact}" for name, fact in self.facts.items()]
        lines += ["", "| model | pass | ours, ms | rival, ms | rival / ours (quartiles) | ours, peak MiB | rival, peak MiB |",
                  "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
        for row in self.comparisons:
            rival, ratio, memory = "", "", ""
            if row.rival is not None:
                lower, middle, upper = row.ratios
                ratio = f"{middle:.2f} ({lower:.2f} to {upper:.2f})"
                rival, memory = f"{row.rival.median * 1e3:.1f}", f"{row.rival.peak_memory / 2**20:.1f}"
            lines.append(f"| {row.model} | {row.kind} | {row.ours.median * 1e3:.1f} | {rival} | {ratio} "
                         f"| {row.ours.peak_memory / 2**20:.1f} | {memory} |")
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """Facts and every round's time, of plain containers and numbers."""
        rows = [asdict(row) | {"ratio_quartiles": row.ratios if row.rival else None} for row in self.comparisons]
        return {"facts": self.facts, "comparisons": rows}


def benchmark(models: list[str], against: Callable[[str], nn.Module] | None = None, *, batch: int = 4,
              size: tuple[int, ...] | None = None, dtype: str = "float32", threads: int = 2, rounds: int = 15, device: str = "cpu",
              compiled: bool = False, passes: Collection[str] = PASSES, clock: Callable[[], float] = time.perf_counter,
              progress: Callable[[str], None] = lambda step: None) -> Report:
    """Compares `models` (names or checkpoints), each with the rival that `against` returns for its name, in each of `passes`.

    A forward pass is in evaluation and inference mode, a forward and backward pass in training mode, to the gradient
    of every parameter from the sum of the logits. Both sides get the same images, of `size` (height, width, or
    depth, height, width; the model's own if None) in `dtype`. `compiled` puts both under `torch.compile`. `clock` gives seconds.
    Raises InputError for settings that cannot be used.
    """
    _check_settings(batch, size, dtype, threads, rounds, device)
    with torch_threads(threads):
        comparisons, sizes = [], {}
        for name_or_path in models:
            ours, info = load_model(name_or_path)
            rival = None if against is None else _build_rival(against, info.name)
            shape = tuple(size or info.input_size[1:])
            sizes[info.name] = "x".join(map(str, shape))
            images = torch.randn(batch, info.input_size[0], *shape, generator=torch.Generator().manual_seed(0))
            images = images.to(device, getattr(torch, dtype))
            for model in filter(None, (ours, rival)):
                model.to(device, getattr(torch, dtype))
                if compiled:
                    model.compile()
            for kind in passes:
                progress(f"{info.name}, {kind}")
                comparisons.append(compare(info.name, kind, ours, rival, images, rounds, clock))
        return Report(facts(batch, sizes, dtype, rounds, device, against is not None, compiled), comparisons)


def load_callable(spec: str) -> Callable[[str], nn.Module]:
    """The object that `MODULE:CALLABLE` names, from an installed module or one below the current folder."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise InputError(f"{spec!r} does not name a callable; write MODULE:CALLABLE")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"the module {module_name} cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(getattr(module, name, None)):
        raise InputError(f"{module_name} has no callable {name}{near_misses(name, dir(module))}")
    return getattr(module, name)


def _check_settings(batch: int, size: tuple[int, ...] | None, dtype: str, threads: int, rounds: int, device: str) -> None:
    numbers = {"batch": batch, "threads": threads, "rounds": rounds, "size": min(size or (1,))}
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} is {value}; it has to be at least 1")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not available; {', '.join(DTYPES)} are")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no GPU here; use cpu")


def _build_rival(against: Callable[[str], nn.Module], name: str) -> nn.Module:
    rival = against(name)
    if not isinstance(rival, nn.Module):
        raise InputError(f"the rival for {name} has to be a torch.nn.Module, not {type(rival).__name__}")
    return rival


def _forward(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


def _forward_backward(model: nn.Module, images: Tensor) -> None:
    model(images).sum().backward()


def compare(name: str, kind: str, ours: nn.Module, rival: nn.Module | None, images: Tensor, rounds: int,
            clock: Callable[[], float]) -> Comparison:
    """Passes of one of `PASSES` through both, in turn."""
    keep_freed_memory()
    run = _forward if kind == FORWARD else _forward_backward
    sides = [ours] if rival is None else [ours, rival]
    memory = []
    for model in sides:
        model.train(kind != FORWARD)
        try:
            run(model, images)  # warms up
        except Exception as error:
            raise InputError(f"{'the rival for ' if model is rival else ''}{name} does not run {kind} on "
                             f"{tuple(images.shape)} {images.dtype} on {images.device}: {error}") from error
        model.zero_grad()
        memory.append(_peak_memory(run, model, images))
        model.zero_grad()
    seconds = [[] for _ in sides]
    for _ in range(rounds):
        for model, times in zip(sides, seconds, strict=True):
            _synchronize(images)
            start = clock()
            run(model, images)
            _synchronize(images)
            times.append(clock() - start)
            model.zero_grad()
    measured = [Side(tuple(times), peak) for times, peak in zip(seconds, memory, strict=True)]
    return Comparison(name, kind, measured[0], measured[1] if rival is not None else None)


def keep_freed_memory() -> None:
    """glibc returns large pieces to the system and takes them anew page by page, which can cost either side more than its work."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def _peak_memory(run: Callable[[nn.Module, Tensor], None], model: nn.Module, images: Tensor) -> int:
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        held = torch.cuda.memory_allocated(images.device)
        run(model, images)
        return torch.cuda.max_memory_allocated(images.device) - held
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise talks on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(model, images)
    events = (event for event in cast(Any, profiled.profiler).kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def facts(batch: int, sizes: dict[str, str], dtype: str, rounds: int, device: str, paired: bool, compiled: bool = False) -> dict[str, str]:
    """The `facts` of a `Report`: date, machine, software, input."""
    processor = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    distinct = set(sizes.values())
    shown = distinct.pop() if len(distinct) == 1 else ", ".join(f"{name} {size}" for name, size in sizes.items())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
        "mode": "torch.compile" if compiled else "eager",
        "input": f"batch {batch}, {shown}, {dtype}, {device}",
        "rounds": f"{rounds}{', taking turns' if paired else ''}; medians; peak memory of tensors above what is held between passes",
    }


def cpu_name() -> str:
    """The processor, with what ratios depend on: its family and model, as several kinds share a name, and the instructions torch takes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = {name.strip(): fact.strip() for name, _, fact in (line.partition(":") for line in lines)}
    kind = [f"{name.removeprefix('cpu ')} {told[name]}" for name in ("cpu family", "model") if name in told]
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join([*kind, torch.backends.cpu.get_cpu_capability()])})"
