"""Checks, tunes and measures the Triton kernels on the GPU of this machine. Steps, in this order:

  check    the kernels' tests, on the GPU instead of in Triton's interpreter
  tune     the fastest configurations near the present ones, into kernels/configurations.json
  measure  every operator beside its rivals, into benchmarks/kernels_<device>.md
  train    training throughput of whole models with and without kernels, into benchmarks/training_<device>.md
"""
import argparse
import functools
import re
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch

import zoo  # noqa: F401  registers the models
from zoo import kernel_benchmark as benchmark
from zoo.cli import run
from zoo.errors import InputError
from zoo.files import replacing
from zoo.kernels import default_backend
from zoo.kernels._launch import add_configurations

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for benchmarks; not first, where its folder zoo would hide the package
STEPS = ("check", "tune", "measure", "train")
MODELS = ("biformer_small", "attnet_t2", "halonet_h2_256", "litv2_s", "das_resnet50")
DTYPE = torch.bfloat16
CHECKING = 240  # seconds, after which tests are stopped
COMPILERS, TUNING = 12, 160  # processes, and seconds for all of it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="example: make gpu, or python tools/gpu.py measure train --seconds 300")
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=520, help="after so long, what remains is left out (default: 520)")
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
    device, deadline, failed = "cpu" if args.dry_run else "cuda", benchmark.Deadline(args.seconds), False
    start = time.monotonic()
    for step in STEPS:
        if args.steps and step not in args.steps:
            continue
        say(f"{step} …")
        with default_backend("triton" if args.dry_run else None):
            failed |= globals()[step](device, deadline, args.dry_run) is False
        say(f"{step} took until second {time.monotonic() - start:.0f}")
    return int(failed)


def say(text: str) -> None:
    print(text, flush=True)


def check(device: str, deadline: benchmark.Deadline, dry: bool) -> bool:
    tests = sorted(ROOT.glob("tests/kernels/test_*_triton.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    if not dry and subprocess.run([sys.executable, "-c", "import xdist"], check=False, capture_output=True).returncode == 0:
        command += ["-n", "8"]
    try:
        return subprocess.run(command + ["--collect-only"] * dry, check=False, cwd=ROOT, timeout=CHECKING).returncode == 0
    except subprocess.TimeoutExpired:
        say(f"the tests were not done after {CHECKING} seconds and were stopped")
        return False


def tune(device: str, deadline: benchmark.Deadline, dry: bool) -> None:
    from benchmarks.kernel_cases import tuning_cases
    cases = functools.partial(tuning_cases, device, DTYPE, dry)
    deadline = benchmark.Deadline(20 if dry else TUNING)
    ahead = (lambda wanted: None) if dry else benchmark.compile_in_processes(cases, COMPILERS, benchmark.Deadline(TUNING / 2))
    found = benchmark.tune(cases(), device, deadline, ahead, say)
    if not dry:
        add_configurations(found)


def measure(device: str, deadline: benchmark.Deadline, dry: bool) -> None:
    from benchmarks.kernel_cases import CASES
    limits, rows, left_out = benchmark.ceilings(device, DTYPE, dry), [], []
    for operator, cases in CASES.items():
        for case in cases(device, DTYPE, dry):
            if deadline.over:
                left_out.append(f"{operator}, {case.name}")
                continue
            say(f"  {operator}, {case.name}")
            rows += benchmark.measure(case, device, limits)
    text = benchmark.table(rows, limits) + "".join(f"\n\nNot measured, out of time: {name}." for name in left_out)
    write("kernels", "The kernels against their rivals", f"{DTYPE}, medians; ratios above 1: ours is faster.\n\n{text}", device, dry)


def train(device: str, deadline: benchmark.Deadline, dry: bool) -> None:
    lines = ["| model | batch | images/s with kernels | images/s without | ratio |", "| --- | ---: | ---: | ---: | ---: |"]
    batch, size, steps = (2, 32, 1) if dry else (64, None, 10)
    for model in ("biformer_nano",) if dry else MODELS:
        if not timm.is_model(model):
            lines.append(f"| {model} | | not in this checkout | | |")
        elif deadline.over:
            lines.append(f"| {model} | | out of time | | |")
        else:
            say(f"  {model}")
            rates = [benchmark.training_throughput(model, backend, device, batch, size, steps)
                     for backend in (("reference", "reference") if dry else (None, "reference"))]
            shown = [f"{rate:.0f}" if rate else "out of memory" for rate in rates]
            lines.append(f"| {model} | {batch} | {shown[0]} | {shown[1]} | {f'{rates[0] / rates[1]:.2f}' if all(rates) else ''} |")
    text = "\n".join(["Forward, backward and SGD under bfloat16 autocast.", "", *lines])
    write("training", "Training with and without kernels", text, device, dry)


def write(name: str, title: str, text: str, device: str, dry: bool) -> None:
    processor = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    page = f"# {title}\n\nWritten by `make gpu` on {time.strftime('%Y-%m-%d')}, {processor}, torch {torch.__version__}, " \
           f"timm {timm.__version__}, zoo from this checkout.\n\n{text}\n"
    say(page)
    if not dry:
        path = ROOT / "benchmarks" / f"{name}_{re.sub(r'[^a-z0-9]+', '_', processor.lower())}.md"
        with replacing(path) as written:
            written.write_text(page)
        say(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run(main)
