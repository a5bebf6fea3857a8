"""Many models as ONNX files, verified and timed one by one, in one table.

What is done is kept: a run that was stopped goes on where it was. A model that cannot be exported is a row that says why.
Times are taken when everything is exported, so that processes that export side by side do not meet in them.
"""
import functools
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo, load_model
from zoo.errors import InputError
from zoo.exporting.onnx import INPUT, ExportError, export_onnx, open_session
from zoo.files import make_folder, replacing
from zoo.threads import torch_threads

THREADS = 2
PICTURES = 64
RECORDS, TABLE = "exports.json", "exports.md"


@dataclass(frozen=True)
class Record:
    """What is known of one model's export; where `failure` says why there is none, the rest is empty.

    `versions` are those of the software that made it; `operators` how often the graph has each; `reason` why the size is
    fixed, empty if it is not; `difference` the largest one to PyTorch in standard deviations of its outputs; `same_top1` for
    how many of 64 images both name the same class (of the mean of all positions, where networks segment); `seconds` of one
    image of the model's own size, PyTorch's and ONNX Runtime's; none before they have been taken.
    """

    versions: Mapping[str, str]
    failure: str = ""
    opset: int = 0
    spell_out: bool = False
    bytes: int = 0
    operators: Mapping[str, int] | None = None
    reason: str = ""
    difference: float = 0.0
    same_top1: int = 0
    seconds: tuple[float, ...] = ()


def export_all(names: Iterable[str], folder: str | Path, *, opset: int = 20, spell_out: bool = False, rounds: int = 5, jobs: int = 1,
               progress: Callable[[str], None] = lambda step: None) -> dict[str, Record]:
    """Exports models with random weights to `folder`/NAME.onnx, and writes the records and a table of them beside.

    Batch, height and width are free where they can be; `opset` and `spell_out` are `export_onnx`'s. What an earlier run with the
    same software and options recorded, and whose file is as it was left, is not done again. `rounds` is how often PyTorch and
    ONNX Runtime, which take turns on two threads, are timed; the median counts. `jobs` processes export at once, and share the two
    threads. `progress`, with several jobs a function that can be pickled, is called with the name of each step.

    Raises InputError for a folder that cannot be written to, and for fewer jobs than one.
    """
    folder = Path(folder)
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it has to be at least 1")
    make_folder(folder)
    records, missing, names = read_records(folder / RECORDS), {}, list(names)
    for number, name in enumerate(names, 1):
        path, found = folder / f"{name}.onnx", records.get(name)
        step = functools.partial(_step, progress, f"{number}/{len(names)} {name}")
        if found and _is_current(found, path, opset, spell_out):
            step("is there already")
        else:
            missing[name] = path, opset, spell_out, max(1, THREADS // jobs), step
    for name, record in _in_processes(_export, missing, jobs):
        records[name] = record
        _write(folder, records)
    for number, name in enumerate(names, 1):
        if not records[name].failure and not records[name].seconds:
            progress(f"{number}/{len(names)} {name}: timing")
            records[name] = replace(records[name], seconds=_times(name, folder / f"{name}.onnx", rounds))
            _write(folder, records)
    return {name: records[name] for name in names}


def read_records(path: Path) -> dict[str, Record]:
    """The records in a file that `export_all` wrote; none if there is no file."""
    if not path.exists():
        return {}
    try:
        return {name: Record(**values) for name, values in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not hold records of exports; remove it to begin anew ({error})") from error


def table(records: Mapping[str, Record]) -> str:
    """The records as a table in Markdown."""
    rows = ["| model | file, MB | opset | nodes | size | difference | same top-1 | PyTorch, ms | ONNX Runtime, ms | operators |",
            "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |"]
    for name, record in sorted(records.items()):
        if record.failure:
            rows.append(f"| `{name}` | | | | failed: {record.failure} | | | | | |")
            continue
        used = cast(dict[str, int], record.operators)  # of what did not fail
        pytorch, runtime = (f"{1e3 * seconds:.1f}" for seconds in record.seconds) if record.seconds else ("", "")
        operators = ", ".join(f"{operator} {count}" for operator, count in sorted(used.items()))
        rows.append(f"| `{name}` | {record.bytes / 1e6:.1f} | {record.opset} | {sum(used.values())} "
                    f"| {record.reason or 'any'} | {record.difference:.1e} | {record.same_top1}/{PICTURES} "
                    f"| {pytorch} | {runtime} | {operators} |")
    return "\n".join(rows)


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    return {module.__name__: module.__version__ for module in (torch, onnx, onnxruntime)}


def _is_current(record: Record, path: Path, opset: int, spell_out: bool) -> bool:
    made = not record.failure and (record.opset, record.spell_out, record.versions) == (opset, spell_out, _versions())
    return made and path.is_file() and path.stat().st_size == record.bytes


def _write(folder: Path, records: Mapping[str, Record]) -> None:
    with replacing(folder / RECORDS) as written:
        written.write_text(json.dumps({name: asdict(record) for name, record in sorted(records.items())}, indent=1) + "\n")
    with replacing(folder / TABLE) as written:
        written.write_text(table(records) + "\n")


def _step(progress: Callable[[str], None], place: str, step: str) -> None:
    progress(f"{place}: {step}")


def _in_processes(function: Callable, arguments: Mapping[str, tuple], jobs: int) -> Iterator[tuple[str, Record]]:
    """Names with the function's results for them and their arguments, as they come; in this process where one job suffices."""
    if jobs == 1 or len(arguments) < 2:
        yield from ((name, function(name, *rest)) for name, rest in arguments.items())
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(function, name, *rest): name for name, rest in arguments.items()}
        for done in as_completed(running):
            yield running[done], done.result()


def _export(name: str, path: Path, opset: int, spell_out: bool, threads: int, progress: Callable[[str], None]) -> Record:
    import onnx
    try:
        with torch_threads(threads):
            model, info = _load(name)
            exported = export_onnx(model, info, path, opset=opset, spell_out=spell_out, progress=progress)
            progress(f"comparing the classes of {PICTURES} images")
            size = info.input_size[1:]
            small = tuple(n // 3 for n in size) if exported.free_size else size  # as good for this, and in a ninth of the time
            same = _same_top1(model, _runner(path, info), _varied_images(info, PICTURES, small))
        if same < PICTURES:
            raise ExportError(f"ONNX Runtime and PyTorch name the same class for {same} of {PICTURES} images only")
    except (ExportError, InputError) as error:
        path.unlink(missing_ok=True)
        return Record(_versions(), str(error))
    operators = dict(Counter(node.op_type for node in onnx.load(path).graph.node))
    return Record(_versions(), "", opset, spell_out, path.stat().st_size, operators, exported.reason, exported.worst, same)


def _times(name: str, path: Path, rounds: int) -> tuple[float, ...]:
    with torch_threads(THREADS):
        model, info = _load(name)
        return _take_turns((model, _runner(path, info)), _varied_images(info, 1, info.input_size[1:]), rounds)


def _load(name: str) -> tuple[nn.Module, ModelInfo]:
    torch.manual_seed(0)
    return load_model(name)


def _runner(path: Path, info: ModelInfo) -> Callable[[Tensor], Tensor]:
    session = open_session(path)
    return lambda images: torch.from_numpy(session.run([info.output], {INPUT: images.numpy()})[0])


def _varied_images(info: ModelInfo, count: int, size: tuple[int, ...]) -> Tensor:
    """Images that differ in what is large on them: noise alone is the same to a network, wherever it pools."""
    coarse = torch.randn(count, info.input_size[0], *(5 for _ in size), generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size, mode="bicubic" if len(size) == 2 else "trilinear")


@torch.inference_mode()
def _same_top1(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> int:
    classes = lambda logits: logits.reshape(*logits.shape[:2], -1).mean(2).argmax(1)  # noqa: E731
    return sum(int((classes(model(batch)) == classes(run(batch))).sum()) for batch in images.split(8))


@torch.inference_mode()
def _take_turns(sides: tuple[Callable[[Tensor], Tensor], ...], image: Tensor, rounds: int) -> tuple[float, ...]:
    """Median seconds of each of the sides, after one turn to warm up."""
    seconds = [[] for _ in sides]
    for _ in range(rounds + 1):
        for side, times in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side(image)
            times.append(time.perf_counter() - start)
    return tuple(median(times[1:]) for times in seconds)
