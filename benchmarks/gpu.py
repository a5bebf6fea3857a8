"""Checks, measures and tunes the Triton kernels on the GPU of this machine. Steps, the most telling first, each a process of its own:

  check    the kernels' tests, on the GPU instead of in Triton's interpreter
  measure  every operator beside its rivals, one problem of each operator first, into benchmarks/kernels_<device>.md
  tune     the fastest configurations of a grid, into kernels/configurations.json and benchmarks/tuning_<device>.md
  train    training throughput of whole models beside their rivals, into benchmarks/training_<device>.md

A step that fails or runs out of time keeps what it has, and the next one goes on. What is written also goes to the folder that the
environment variable OUT names.
"""
import argparse
import contextlib
import functools
import importlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch

import zoo  # noqa: F401  registers the models
from zoo.errors import InputError
from zoo.files import replacing
from zoo.kernels import default_backend
from zoo.kernels._backends import interpreted
from zoo.kernels._launch import CONFIGURATIONS, add_configurations, architecture
from zoo.measuring import kernel_benchmark as benchmark
from zoo.tools._cli import run

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"check": 110, "measure": 170, "tune": 120, "train": 120}  # of the time; what a step leaves is the next ones'
STEPS = tuple(SHARES)
RIVALS = {  # of `train`: the module whose `build` makes the network as the authors, timm or torchvision have it
    "biformer_small": "biformer_authors", "litv2_s": "litv2_authors", "halonet_h2_256": "halo_timm", "attnet_t2": "attnet_authors",
    "das_resnet50": "das_torchvision"}
DTYPE = torch.bfloat16
GRACE = 20  # seconds by which a step may be late
LAST_WORDS = 15  # seconds for tests that are stopped to say what has failed so far
COMPILERS = min(14, os.cpu_count() or 1)  # processes, each with the problems to tune in the GPU's memory


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="example: make gpu, or make gpu GPU_OPTIONS='check measure --seconds 300'")
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=sum(SHARES.values()),
                        help="after so long, what remains is left out (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder that also gets copies of the files written")
    parser.add_argument("--dry-run", action="store_true", help="tiny problems in Triton's interpreter on the CPU; writes nothing")
    args = parser.parse_args(arguments)
    unknown = [step for step in args.steps if step not in STEPS]
    if unknown:
        raise InputError(f"there is no step {unknown[0]!r}; steps are {', '.join(STEPS)}")
    if not args.dry_run and not torch.cuda.is_available():
        raise InputError("torch finds no GPU here; --dry-run goes through the steps on the CPU")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.dry_run and not interpreted():  # asked when Triton is imported, which it is by now
        command = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, check=False, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    steps = [step for step in STEPS if not args.steps or step in args.steps]
    if len(steps) > 1:
        failed = [step for step, left in remaining(steps, args.seconds) if not run_alone(step, left, args)]
        say(f"failed: {', '.join(failed)}" if failed else "all steps done")
        return int(bool(failed))
    device = "cpu" if args.dry_run else "cuda"
    with default_backend("triton" if args.dry_run else None):
        failed = globals()[steps[0]](device, benchmark.Deadline(args.seconds), args) is False
    return int(failed)


def remaining(steps: list[str], seconds: float) -> Iterator[tuple[str, float]]:
    """The steps, each when its turn has come, and how long it may take."""
    start, whole = time.monotonic(), sum(SHARES[step] for step in steps)
    for step, share in zip(steps, itertools.accumulate(SHARES[step] for step in steps), strict=True):
        yield step, start + seconds * share / whole - time.monotonic()
        say(f"{step} took until second {time.monotonic() - start:.0f}")


def run_alone(step: str, seconds: float, args: argparse.Namespace) -> bool:
    """In a process of its own: a kernel that reads where it must not leaves its process without a GPU."""
    say(f"{step} …")
    options = ["--seconds", f"{max(0, seconds):.0f}", *["--dry-run"] * args.dry_run]
    options += ["--output", args.output] if args.output else []
    try:
        command = [sys.executable, "-m", "benchmarks.gpu", step, *options]
        return subprocess.run(command, check=False, timeout=max(0, seconds) + GRACE).returncode == 0
    except subprocess.TimeoutExpired:
        say(f"{step} did not end and was stopped")
        return False


def say(text: str) -> None:
    print(text, flush=True)


def check(device: str, deadline: benchmark.Deadline, args: argparse.Namespace) -> bool:
    tests = sorted(ROOT.glob("tests/kernels/test_*_triton.py"))
    # The checkout stays as it is, and the little output that comes back from such a machine holds what failed.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider", *tests]
    if not args.dry_run and subprocess.run([sys.executable, "-c", "import xdist"], check=False, capture_output=True).returncode == 0:
        command += ["-n", "8"]
    tested = subprocess.Popen(command + ["--collect-only"] * args.dry_run, cwd=ROOT)
    try:
        return tested.wait(deadline.left) == 0
    except subprocess.TimeoutExpired:
        say(f"the tests were not done after {args.seconds} seconds and were stopped")
        tested.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            tested.wait(LAST_WORDS)
        tested.kill()
        return False


def measure(device: str, deadline: benchmark.Deadline, args: argparse.Namespace) -> bool:
    from benchmarks.kernel_cases import CASES
    limits, rows, left_out, page = benchmark.ceilings(device, DTYPE, args.dry_run), [], [], ""
    for case in in_turn([cases(device, DTYPE, args.dry_run) for cases in CASES.values()]):
        if deadline.over:
            left_out.append(f"{case.operator}, {case.name}")
            continue
        say(f"  {case.operator}, {case.name}")
        rows += benchmark.measure(case, device, limits)
        torch.compiler.reset()  # torch counts what it compiled of a function, and gives up
        page = f"{DTYPE}, medians; ratios above 1: ours is faster.\n\n{benchmark.table(rows, limits)}"
        write("kernels", "The kernels against their rivals", page, args)
    if rows and left_out:
        page += "".join(f"\n\nNot measured, out of time: {name}." for name in left_out)
        write("kernels", "The kernels against their rivals", page, args)
    say(page)
    if left_out:
        say(f"not measured, out of time: {'; '.join(left_out)}")
    return not any(row.failures.get("ours") for row in rows)


def in_turn(generators: list[Iterator[benchmark.Case]]) -> Iterator[benchmark.Case]:
    """One of each, then the next of each: the first of every operator is its most telling."""
    return (case for round_ in itertools.zip_longest(*generators) for case in round_ if case is not None)


def tune(device: str, deadline: benchmark.Deadline, args: argparse.Namespace) -> None:
    from benchmarks.kernel_cases import tuning_cases
    cases, found = functools.partial(tuning_cases, device, DTYPE, args.dry_run), {}

    def keep(tuned: benchmark.Tuned) -> None:
        key = f"{architecture(torch.device(device))} {tuned.key}".strip()
        before = found[tuned.kernel, key].before if (tuned.kernel, key) in found else tuned.before
        found[tuned.kernel, key] = tuned._replace(before=before)
        if tuned.after < tuned.before:
            add_configurations({tuned.kernel: {key: tuned.chosen}})
            copy(CONFIGURATIONS, args)
        lines = [f"| {one.kernel} | {key} | {one.before * 1e6:.1f} | {one.after * 1e6:.1f} | {one.before / one.after:.2f} | "
                 f"{', '.join(f'{name} {value}' for name, value in one.chosen.items())} |" for (_, key), one in found.items()]
        head = ["| kernel | problem | before, µs | after, µs | gain | configuration |", "| --- | --- | ---: | ---: | ---: | --- |"]
        write("tuning", "The kernels' configurations", "\n".join([*head, *lines]), args)

    if args.dry_run:  # the interpreter would take minutes
        benchmark.tune(cases(), device, benchmark.Deadline(20), lambda *wanted: None, lambda tuned: None, say)
    else:
        benchmark.tune(cases(), device, deadline, benchmark.compile_in_processes(cases, COMPILERS), keep, say)


def train(device: str, deadline: benchmark.Deadline, args: argparse.Namespace) -> bool:
    """Eager networks first, then compiled ones; compilers take minutes of what time is left."""
    lines = ["Forward, backward and SGD under bfloat16 autocast, compiled in one graph; ratios above 1: ours is faster.", "",
             "| model | batch | side | images/s | ours, eager / side |", "| --- | ---: | --- | ---: | ---: |"]
    models = {"attnet_xxs": "attnet_authors"} if args.dry_run else RIVALS
    batch, steps = (2, 1) if args.dry_run else (64, 10)
    fast, eager, failed = "pytorch" if args.dry_run else None, {}, False
    sides = [
        ("ours, eager", True, fast, None), ("rival, eager", False, None, None), ("ours, compiled", True, fast, "default"),
        ("reference, compiled", True, "reference", "default"), ("ours, max-autotune", True, fast, "max-autotune")]
    for (name, own, backend, mode), model in [(side, model) for part in (sides[:2], sides[2:]) for model in models for side in part]:
        side = name.replace("rival", models[model])
        if deadline.over:
            say(f"not measured, out of time: {model}, {side}")
            continue
        say(f"  {model}, {side}")
        build = functools.partial(timm.create_model, model) if own else functools.partial(rival, models[model], model)
        size = 32 if args.dry_run else timm.get_pretrained_cfg(model).input_size[1]
        try:
            rate = benchmark.training_throughput(build, backend, mode, device, batch, size, steps)
        except Exception as error:  # of compilers, drivers and memory, as in `measure`; the rest is still worth measuring
            failed |= own and backend == fast
            lines.append(f"| {model} | {batch} | {side} | {benchmark.reason(error)} | |")
        else:
            if name == "ours, eager":
                eager[model] = rate
            ratio = f"{eager[model] / rate:.2f}" if model in eager else ""
            lines.append(f"| {model} | {batch} | {side} | {rate:.0f} | {ratio} |")
        write("training", "Training beside rivals", "\n".join(lines), args)
    say("\n".join(lines))
    return not failed


def rival(module: str, model: str) -> torch.nn.Module:
    return importlib.import_module(f"benchmarks.{module}").build(model)


def write(name: str, title: str, text: str, args: argparse.Namespace) -> None:
    if args.dry_run:
        return
    processor = torch.cuda.get_device_name()
    page = f"# {title}\n\nWritten by `make gpu` on {time.strftime('%Y-%m-%d')}, {processor}, torch {torch.__version__}, " \
           f"timm {timm.__version__}, zoo from this checkout.\n\n{text}\n"
    path = ROOT / "benchmarks" / f"{name}_{re.sub(r'[^a-z0-9]+', '_', processor.lower())}.md"
    with replacing(path) as written:
        written.write_text(page)
    copy(path, args)


def copy(path: Path, args: argparse.Namespace) -> None:
    for folder in {args.output, Path(os.environ["OUT"]) if os.environ.get("OUT") else None} - {None}:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)


if __name__ == "__main__":
    run(main)
