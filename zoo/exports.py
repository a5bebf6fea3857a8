"""Many models as ONNX files, verified and timed one by one, in one table.

What is done is kept: a run that was stopped goes on where it was. A model that cannot be exported is a row that says why.
"""
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.checkpoints import ModelInfo, load_model
from zoo.errors import InputError
from zoo.export import INPUT, ExportError, export_onnx, open_session
from zoo.files import replacing

THREADS = 2
PICTURES = 64
RECORDS, TABLE = "exports.json", "exports.md"


@dataclass(frozen=True)
class Record:
    """What is known of one model's export; where `failure` says why there is none, the rest is empty.

    `versions` are those of the software that made it; `operators` how often the graph has each; `reason` why the size is
    fixed, empty if it is not; `difference` the largest one to PyTorch in standard deviations of its outputs; `same_top1` for
    how many of 64 images both name the same class (of the mean of all positions, where networks segment); `seconds` of one
    image of the model's own size, PyTorch's and ONNX Runtime's.
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
    seconds: tuple[float, float] = (0.0, 0.0)


def export_all(names: Iterable[str], folder: str | Path, *, opset: int = 20, spell_out: bool = False, rounds: int = 5,
               progress: Callable[[str], None] = lambda step: None) -> dict[str, Record]:
    """Exports models with random weights to `folder`/NAME.onnx, and writes the records and a table of them beside.

    Batch, height and width are free where they can be; `opset` and `spell_out` are `export_onnx`'s. What an earlier run with the
    same software and options recorded, and whose file is as it was left, is not done again. `rounds` is how often PyTorch and
    ONNX Runtime, which take turns on two threads, are timed; the median counts. `progress` is called with the name of each step.

    Raises InputError for a folder that cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; exporting several models needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    before, records, names = read_records(folder / RECORDS), {}, list(names)
    for number, name in enumerate(names, 1):
        place, path = f"{number}/{len(names)} {name}", folder / f"{name}.onnx"
        found = before.get(name)
        if found and _is_current(found, path, opset, spell_out):
            progress(f"{place}: is there already")
            records[name] = found
            continue
        records[name] = _export(name, path, opset, spell_out, rounds, lambda step, place=place: progress(f"{place}: {step}"))
        _write(folder, before | records)
    return records


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
        pytorch, runtime = (f"{1e3 * seconds:.1f}" for seconds in record.seconds)
        operators = ", ".join(f"{operator} {count}" for operator, count in sorted(record.operators.items()))
        rows.append(f"| `{name}` | {record.bytes / 1e6:.1f} | {record.opset} | {sum(record.operators.values())} "
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


def _export(name: str, path: Path, opset: int, spell_out: bool, rounds: int, progress: Callable[[str], None]) -> Record:
    import onnx
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        torch.manual_seed(0)
        model, info = load_model(name)
        exported = export_onnx(model, info, path, opset=opset, spell_out=spell_out, progress=progress)
        session = open_session(path)

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run([info.output], {INPUT: images.numpy()})[0])

        progress(f"comparing the classes of {PICTURES} images")
        size = info.input_size[1:]
        small = tuple(n // 2 for n in size) if exported.free_size else size  # as good for this, and in a quarter of the time
        same = _same_top1(model, run, _varied_images(info, PICTURES, small))
        if same < PICTURES:
            raise ExportError(f"ONNX Runtime and PyTorch name the same class for {same} of {PICTURES} images only")
        progress("timing")
        seconds = _take_turns((model, run), _varied_images(info, 1, size), rounds)
    except (ExportError, InputError) as error:
        path.unlink(missing_ok=True)
        return Record(_versions(), str(error))
    finally:
        torch.set_num_threads(threads)
    operators = dict(Counter(node.op_type for node in onnx.load(path).graph.node))
    return Record(_versions(), "", opset, spell_out, path.stat().st_size, operators, exported.reason, exported.worst, same, seconds)


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
