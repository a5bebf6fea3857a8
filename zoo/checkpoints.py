"""Models from names, and from the checkpoints that training writes."""
import dataclasses
import math
import reprlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import timm
import timm.data
from torch import Tensor, nn

import zoo.models  # noqa: F401  registers what checkpoints name
from zoo.changes import CHANGES, Change, are_changes, change, finish
from zoo.errors import InputError, near_misses
from zoo.probe import probe
from zoo.weights import CHECKPOINT_SUFFIXES, load_weights, read

TASKS = ("classification", "segmentation", "restoration", "saliency", "fixations")
TOOLBOX_TASKS = ("mmdet", "mmseg")  # what the checkpoints of their models record as the task; zoo.mm.downstream reads them
OUTPUTS = {"fixations": "saliency", "restoration": "picture"}  # what networks give that give no logits, by task
MODEL_PREFIX = "model."  # the training task holds the network as its attribute `model`
# Arguments of timm.create_model that say which weights training started from. Those of a checkpoint take their place, so that
# loading it neither opens the files that they name nor downloads anything.
SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a loaded model beside its weights.

    `name` is the registered name; `classes` the class names in the order of the logits, empty if nobody recorded
    them; `data_config` the input that the model expects, as timm.data.create_transform takes it: `input_size`
    (channels, height, width), `mean` and `std` per channel for pixels in [0, 1], `interpolation`, `crop_pct`,
    `crop_mode`. For segmentation `input_size` is that of a window, for saliency that of the first look, for fixations that of all
    that is seen, in 3-D (channels, depth, height, width), and `spacing` and `clip` are what `zoo.reading.volumes.Grid` takes. `task` is
    one of `TASKS`, or "detection" of a detector that is exported; `output` is what the model gives, by name; `changes` what was done to
    the network after it was built, see `zoo.changes`.
    """

    name: str
    classes: tuple[str, ...]
    data_config: dict
    task: str = "classification"
    output: str = "logits"
    changes: tuple[Change, ...] = ()

    @property
    def input_size(self) -> tuple[int, ...]:
        return tuple(self.data_config["input_size"])

    def class_name(self, index: int) -> str:
        return str(self.classes[index]) if index < len(self.classes) else f"class {index}"


def load_model(name_or_path: str | Path, **model_args) -> tuple[nn.Module, ModelInfo]:
    """A model in evaluation mode on the CPU, and what is known about it.

    `name_or_path` is a registered model's name (weights are random, or pretrained with `pretrained=True`) or the
    path of a checkpoint that zoo's training wrote; `model_args` go to timm.create_model, over the recorded ones.

    Raises InputError for an unknown model, for what `read` refuses, and for a checkpoint of something else.
    """
    text = str(name_or_path)
    if timm.is_model(text):
        model = timm.create_model(text, **model_args).eval()
        return model, ModelInfo(text, (), _data_config(model, {}, model_args), *of_network(model))
    if Path(text).exists() or text.endswith(CHECKPOINT_SUFFIXES) or "/" in text:
        return load_trained(text, **model_args)
    raise InputError(f"there is neither a model nor a file called {text!r}{near_misses(text, timm.list_models())}")


def of_network(model: nn.Module) -> tuple[str, str]:
    """The task that a network is for, one of `TASKS`, and what it gives."""
    task = getattr(model, "task", "segmentation" if hasattr(model, "spatial_dims") else "classification")
    return task, OUTPUTS.get(task, "logits")


@dataclass(frozen=True)
class Opened:
    """A checkpoint that has been read: its path, and what it holds. Whatever loads models takes it in the place of the path."""

    path: Path
    content: object = dataclasses.field(repr=False)

    @property
    def record(self) -> dict | None:
        """What zoo's training recorded in it beside weights; None if the checkpoint is another's."""
        record = self.content.get("zoo") if isinstance(self.content, dict) else None
        return record if isinstance(record, dict) else None

    @property
    def task(self) -> object:
        """What it was trained for: one of `TASKS` or `TOOLBOX_TASKS`, unless its record is unsound; None without a record."""
        return None if self.record is None else self.record.get("task")


def opened(checkpoint: str | Path | Opened) -> Opened:
    """The checkpoint at a path, read once for all that is done with it. Raises InputError for what `read` refuses."""
    if isinstance(checkpoint, Opened):
        return checkpoint
    if timm.is_model(str(checkpoint)) and not Path(checkpoint).exists():
        raise InputError(f"there is no checkpoint {checkpoint}; that is a model's name, whose weights would be random: give a file that "
                         "`zoo train` wrote")
    return Opened(Path(checkpoint), read(checkpoint))


def load_trained(checkpoint: str | Path | Opened, **model_args) -> tuple[nn.Module, ModelInfo]:
    """Like `load_model` for a checkpoint only: a model with trained weights, never random ones.

    What was done to it after it was built, by `zoo.changes`, is done again; attention of which training has left nothing is taken out.
    """
    checkpoint = opened(checkpoint)
    path = checkpoint.path
    record, weights = _trained_parts(checkpoint)
    name = record["model"]
    if not timm.is_model(name):
        raise InputError(f"{path} holds a model {name!r} that is not registered here{near_misses(name, timm.list_models())}")
    classes = tuple(record.get("classes") or ())
    recorded_args = without(record.get("model_args") or {}, SOURCES)
    probed = record.get("probe")
    if classes and probed is None:
        known = recorded_args.setdefault("num_classes", len(classes))
        if isinstance(known, int) and known != len(classes):
            raise InputError(f"{path} records {len(classes)} classes and a network of {known}, so that nothing says which is which")
    model_args = {**recorded_args, "pretrained": False, **model_args}
    try:
        model = timm.create_model(name, **model_args)
        change(model, record.get("changes") or ())
        network, config = model, _data_config(model, record, model_args)
        if probed is not None:
            model = probe(network, len(classes), **probed)
    except Exception as error:  # every model stumbles in its own way over an argument out of place
        raise InputError(f"{path} records arguments that {name} does not take: {one_line(error)}") from error
    sizes, dims = record.get("input_size"), getattr(model, "spatial_dims", 2)
    if sizes is not None and len(sizes) != 1 + dims:
        raise InputError(f"{path} records input_size={tuple(sizes)}, and {name} takes channels and {dims} sizes")
    if differing := differences(model.state_dict(), weights):
        raise InputError(f"the weights in {path} do not fit {name}: {differing}")
    check_numbers(path, weights)
    model.load_state_dict(weights)
    changes = tuple(finish(network, record.get("changes") or ()))
    return model.eval(), ModelInfo(name, classes, config, record["task"], OUTPUTS.get(record["task"], "logits"), changes)


def load_released(name: str, file: str | Path) -> tuple[nn.Module, ModelInfo]:
    """A model in evaluation mode with the weights in a file of its authors (`zoo.models.released`), and what is known about it.

    Raises InputError for an unknown model, and for a file that does not hold its weights.
    """
    if not timm.is_model(name):
        raise InputError(f"there is no model {name!r}{near_misses(name, timm.list_models())}")
    return load_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


def check_downloadable(model: str) -> None:
    """Raises InputError unless timm or the zoo knows where weights of the model are."""
    cfg: Any = timm.get_pretrained_cfg(model)
    if not (cfg.url or cfg.hf_hub_id or cfg.file):
        raise InputError(f"there are no weights of {model} to download; --weights takes a file, and without it training starts from random "
                         "ones")


def recorded_changes(file: str | Path) -> list[Change]:
    """What was done to the network of a file of weights after it was built, as far as the file says."""
    checkpoint = opened(file)
    return list(load_trained(checkpoint)[1].changes) if (checkpoint.record or {}).get("changes") else []


def start_from(model: nn.Module, file: str | Path, changes: Sequence[Change]) -> None:
    """Loads the weights in `file`, but for the head's, into a network as timm builds it, and makes `changes` to it, in place.

    Changes that the file records are those of its own network, and made before.
    """
    record = opened(file).record or {}
    check_record(file, record, {"changes": FIELDS["changes"]}, needed=())
    recorded = record.get("changes") or ()
    change(model, recorded)
    load_weights(model, file, new_head=True)
    if list(map(dict, finish(model, recorded))) != list(map(dict, changes)):
        change(model, changes)


def without(value: Any, keys: Container[str]) -> Any:
    """A recorded value of dicts and lists without what is under `keys`, at any depth."""
    if isinstance(value, Mapping):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list | tuple):
        return type(value)(without(item, keys) for item in value)
    return value


def one_line(error: Exception) -> str:
    """What the error of a library says, or its kind if it says nothing, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _are_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(
        isinstance(item, Real) and not isinstance(item, bool) and abs(item) < math.inf  # pyright: ignore[reportOperatorIssue]
        for item in value)  # the stub of Real gives abs no order


def are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str | int) for item in value)


# By field of a record: what is sound, and how it is called. Fields may be missing or None.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a model's name"),
    "model_args": (lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value), "a dict of arguments by name"),
    "probe": (lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value), "a dict of zoo.probe's arguments"),
    "classes": (are_names, "a list of names"),
    "input_size": (lambda value: _are_numbers(value) and all(isinstance(item, int) for item in value) and len(value) in (3, 4)
                   and min(value) > 0, "a list of 3 or 4 whole numbers above 0"),
    "mean": (_are_numbers, "a list of numbers"),
    "std": (lambda value: _are_numbers(value) and min(value) > 0, "a list of numbers above 0"),
    "interpolation": (lambda value: isinstance(value, str) and value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_pct": (lambda value: _are_numbers([value]) and 0.01 <= value <= 1, "a number from 0.01 to 1"),
    "crop_mode": (lambda value: isinstance(value, str) and value in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
    "spacing": (lambda value: _are_numbers(value) and len(value) == 3 and min(value) > 0, "3 numbers above 0"),
    "changes": (are_changes, f"a list of changes, each of a type {', '.join(CHANGES)}"),
    "clip": (lambda value: _are_numbers(value) and len(value) == 2 and value[0] < value[1], "a number and a greater one"),
}


def check_record(path: str | Path, record: Mapping, fields: Mapping[str, tuple[Callable[[Any], bool], str]] = FIELDS,
                 needed: Container[str] = ("model",)) -> None:
    """Raises InputError for the first field of the `record` in the checkpoint at `path` that is not as `fields` say.

    Those in `needed` have to be there.
    """
    for field, (sound, called) in fields.items():
        value = record.get(field)
        if value is None and field in needed:
            raise InputError(f"{path} does not record {field!r}, where {called} is needed")
        if value is not None and not sound(value):
            raise InputError(f"{path} records {field}={' '.join(reprlib.repr(value).split())}, where {called} is needed")


def _trained_parts(checkpoint: Opened) -> tuple[dict, dict[str, Tensor]]:
    """The record `zoo` of a checkpoint that training wrote, sound, and the model's weights by the model's own names."""
    path, content, record = checkpoint.path, checkpoint.content, checkpoint.record
    state = content.get("state_dict") if isinstance(content, dict) else None
    if record is None or not isinstance(state, dict):
        found = ", ".join(map(str, list(content)[:4])) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path} is not a checkpoint of `zoo train`: it holds {found or 'nothing'}, "
                         "where 'zoo' and 'state_dict' are needed")
    task = record.get("task")
    if task in TOOLBOX_TASKS:
        kind = "detector of mmdetection" if task == "mmdet" else "segmentor of mmsegmentation"
        raise InputError(f"{path} holds a {kind}, which `zoo predict` and `zoo export` take and this does not")
    if task not in TASKS:
        raise InputError(f"{path} holds a model for {task!r}, not for {' or '.join(map(repr, TASKS))}")
    check_record(path, record)
    weights = {key.removeprefix(MODEL_PREFIX): value for key, value in state.items()
               if isinstance(key, str) and key.startswith(MODEL_PREFIX) and isinstance(value, Tensor)}
    return record, weights


def check_numbers(path: str | Path, weights: Mapping[str, Any]) -> None:
    """Raises InputError if some of the weights in the checkpoint at `path` are NaN, as those of a run that diverged."""
    bad = [key for key, value in weights.items() if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any()]
    if bad:
        raise InputError(f"{len(bad)} of {len(weights)} weights in {path} are not numbers (NaN), such as {bad[0]}: the run that wrote them "
                         "had diverged")


def differences(needed: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What `given` weights lack, have too much or in another shape than `needed`, the first three of each; "" if nothing."""
    shapes = {key: tuple(value.shape) for key, value in needed.items()}
    problems = {
        "missing": [key for key in shapes if key not in given],
        "unexpected": [key for key in given if key not in shapes],
        "of another shape": [f"{key} {tuple(value.shape)} where {shapes[key]} is needed"
                             for key, value in given.items() if key in shapes and tuple(value.shape) != shapes[key]],
    }
    return "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
                     for kind, keys in problems.items() if keys)


def seems(content: object) -> str:
    """What a checkpoint seems to be, by what training recorded in it or else by the names of its weights."""
    record = content.get("zoo") if isinstance(content, dict) else None
    if isinstance(record, dict):
        model, classes = record.get("model"), record.get("classes")
        if isinstance(model, dict):
            model = " with ".join(str(part.get("name") or part.get("type")) for part in (model, model.get("backbone") or {}) if part)
        known = f" with {len(classes)} classes" if isinstance(classes, list | tuple) else ""
        return f"it is a checkpoint for {record.get('task')} of {model}{known}"
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    names = [name for name, value in tensors.items() if isinstance(value, Tensor)] if isinstance(tensors, dict) else []
    return f"it holds {len(names)} tensors, whose names begin with {', '.join(map(str, names[:3]))}" if names else "it holds no weights"


def _data_config(model: nn.Module, record: Mapping, model_args: Mapping) -> dict:
    config = timm.data.resolve_model_data_config(model)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "spacing", "clip")
    config.update({key: record[key] for key in keys if record.get(key) is not None})
    channels = model_args.get("in_chans", config["input_size"][0])
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):  # timm's defaults are for three channels whatever the model has
        values = tuple(config[key])
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return config
