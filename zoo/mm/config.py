"""Finding, changing and checking configs before anything is built or written."""
import ast
import contextlib
import importlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from numbers import Number
from pathlib import Path
from typing import Any, cast
from unittest import mock

import timm
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    VISUALIZERS,
    DefaultScope,
    Registry,
)
from mmengine.runner import Runner
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from zoo.errors import InputError, near_misses
from zoo.toolboxes import INSTALL, TOOLBOXES

# Beside the arguments of Runner: what it looks up in the config later, and the folder that `load_config` hands on.
TOP_LEVEL = set(inspect.signature(Runner).parameters) - {"cfg"} | {
    "data_root", "custom_imports", "model_wrapper_cfg", "find_unused_parameters", "sync_bn", "compile",
    "activation_checkpointing", "efficient_conv_bn_eval",
} | {"report"}  # whether training leaves a report.html
PARTS = ("train", "val", "test")
HOUSE_HOOKS = ("IterationSeedHook", "FiniteHook", "ScreenHook")
BACKENDS = ("LocalVisBackend", "TensorboardVisBackend")
# Of metrics, the prefix and name of the number that says which checkpoint is the best.
BEST = {"Accuracy": ("accuracy", "top1"), "MeanIoU": ("iou", "mean"), "MeanDice": ("dice", "mean"), "Restoration": ("restoration", "psnr"),
        "SaliencyMetrics": ("saliency", "S"),
        "IoUMetric": ("", "mIoU"), "VOCMetric": ("pascal_voc", "mAP"), "LVISMetric": ("lvis", "bbox_AP"), "CityscapesMetric": ("cityscapes",
        "averageScore")}
# Keys of the config that arguments of training and testing say, and how.
ARGUMENTS = {"resume": "--resume says so", "launcher": "--launcher says which"}
# By toolbox, what takes the place of its own parts, and of those that are only replaced if no other argument is given, what is kept.
HOUSE_PARTS = {
    "mmdet": {"LoadImageFromFile": "LoadPicture", "CocoDataset": "CheckedCocoDataset", "CocoMetric": "CheckedCocoMetric"},
    "mmseg": {"LoadImageFromFile": "LoadPicture", "LoadAnnotations": "LoadLabels"},
}
COCO_METRICS = ("CocoMetric", HOUSE_PARTS["mmdet"]["CocoMetric"])
KEPT_ARGUMENTS = {"LoadImageFromFile": ("to_float32",), "LoadAnnotations": ("mask_values", "reduce_zero_label")}


def load_config(name: str | Path, options: Sequence[str] = ()) -> Config:
    """The config in the file `name`, or of that bare name among the installed ones, changed by `options` and checked.

    Options are texts "a.b.c=value"; a digit names an element of a list; values are Python literals, or else text. A
    top-level `data_root` becomes the `root` of every dataset that takes one and sets none; changed by an option, it also
    takes the place of the old one in every path of the config that begins with it.

    Raises InputError for a config or option that does not exist, for whatever the engine would not know, and where the
    config needs a toolbox that is not installed.
    """
    path = find_config(str(name))
    try:
        with mock.patch.dict(MODULE2PACKAGE, mmseg="mmseg"):  # the engine would look for the package under upstream's name
            config = Config.fromfile(path)
        import_toolbox(config.get("default_scope") or "mmengine")
    except ImportError as error:
        missing = next((name for name in TOOLBOXES if name in str(error) or TOOLBOXES[name] in str(error)), None)
        if missing is None:
            raise InputError(f"the config {path} cannot be read: {error}") from error
        raise InputError(f"the config {path} needs {TOOLBOXES[missing]}; {INSTALL}") from error
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise InputError(f"the config {path} cannot be read: {type(error).__name__}: {error}") from error
    for name in [name for name in config if name.startswith("_")]:
        config.pop(name)  # variables of the config's own
    known = TOP_LEVEL
    if config.get("default_scope") in TOOLBOXES:
        known = known | set(config)  # the toolboxes' configs keep variables of their own at the top
    data_root = config.get("data_root")
    for option in options:
        _check_read(config, option)
        _apply(config, option)
    if data_root and config.data_root != data_root:
        old, new = f"{data_root.rstrip('/')}/", f"{config.data_root.rstrip('/')}/"
        change_texts(config, lambda text: new + text[len(old):] if f"{text}/".startswith(old) else text)
    if config.get("default_scope") in HOUSE_PARTS:
        _read_by_house_parts(config)
    _add_house_rules(config)
    with scope(config):
        for part in PARTS:
            dataset = (config.get(f"{part}_dataloader") or {}).get("dataset")
            if dataset and "data_root" in config:
                kind = _find(DATASETS, dataset.get("type"), f"{part}_dataloader.dataset")
                if "root" in _known_arguments(kind):
                    dataset.setdefault("root", config.data_root)
        check_config(config, known)
    if any(option.startswith("data_root=") for option in options):
        _check_root_read(config)
    return config


def import_toolbox(name: str) -> None:
    """Registers what the toolbox has, and what it lacks and the configs here name; without a word of what else could be installed."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(name)
        if name in HOUSE_PARTS:
            importlib.import_module(f"zoo.mm.{name}_parts")


def _read_by_house_parts(config: Config) -> None:
    """Puts the house's parts that read pictures, masks and annotations in the places of the toolbox's, which some data mislead."""
    parts = HOUSE_PARTS[config.default_scope]

    def changed(value: Any) -> Any:
        if isinstance(value, Mapping):
            result = {key: changed(item) for key, item in value.items()}
            name = result.get("type")
            if name in parts and not any(result.get(key) for key in result if key not in ("type", *KEPT_ARGUMENTS.get(name, result))):
                result = {key: item for key, item in result.items() if key in ("type", *KEPT_ARGUMENTS.get(name, result))}
                result["type"] = parts[name]
            return result
        return type(value)(map(changed, value)) if isinstance(value, list | tuple) else value

    for key, value in config.to_dict().items():
        if key.endswith(("_dataloader", "_evaluator", "_pipeline")):
            config[key] = changed(value)


def _add_house_rules(config: Config) -> None:
    """What every run has, whatever the config and its options say of hooks: whole checkpoints that say what they are, the best of them
    kept, a stop where numbers are no longer finite, TensorBoard's curves, lines on the screen, and a seed."""
    record = "RecordSceneHook" if config.get("default_scope") in TOOLBOXES else "RecordHook"
    own = [hook for _, hook in _numbered("", config.get("custom_hooks"))]
    config.custom_hooks = [*(hook for hook in own if _kind(hook) not in (*HOUSE_HOOKS, record)),
                           *({"type": kind} for kind in (*HOUSE_HOOKS, record))]
    hooks = dict(config.get("default_hooks") or {})
    checkpoint = hooks.get("checkpoint", {"interval": 1})
    if _kind(checkpoint) in ("", "CheckpointHook", "AtomicCheckpointHook") and isinstance(checkpoint, Mapping):
        best = _best_metric(config)
        chosen = {"save_best": best, "rule": "greater"} if best and "save_best" not in checkpoint else {}
        hooks["checkpoint"] = {"max_keep_ckpts": 3, **chosen, **checkpoint, "type": "AtomicCheckpointHook"}
    config.default_hooks = hooks
    visualizer = {"type": "Visualizer", **(config.get("visualizer") or {})}
    backends = [backend for _, backend in _numbered("", visualizer.get("vis_backends"))]
    visualizer["vis_backends"] = [*backends, *({"type": kind} for kind in BACKENDS if kind not in map(_kind, backends))]
    config.visualizer = visualizer
    config.randomness = {"seed": 0, **(config.get("randomness") or {})}


def _kind(part: object) -> str:
    """The bare name of the class that a dict of the config names, or of none."""
    kind = part.get("type", "") if isinstance(part, Mapping) else ""
    return kind.rpartition(".")[-1] if isinstance(kind, str) else getattr(kind, "__name__", "")


def _best_metric(config: Config) -> str | None:
    """What the first of the metrics calls the number by which checkpoints are compared; None of a metric that is not known here."""
    for _, metric in _numbered("", config.get("val_evaluator")):
        kind = _kind(metric)
        if kind in COCO_METRICS:
            measured = metric.get("metric", "bbox")
            measured = [measured] if isinstance(measured, str) else measured
            return f"{metric.get('prefix') or 'coco'}/{'bbox' if 'bbox' in measured else measured[0]}_mAP"
        if kind in BEST:
            prefix, name = BEST[kind]
            prefix = metric.get("prefix") or prefix
            return f"{prefix}/{name}" if prefix else name
    return None


def scope(config: Config) -> contextlib.AbstractContextManager:
    """Inside, registries look up names in the config's toolbox first."""
    return DefaultScope.overwrite_default_scope(config.get("default_scope") or "mmengine")


def change_texts(config: Config, change: Callable[[str], str]) -> None:
    """Puts `change(text)` in the place of every text in the config."""
    def changed(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: changed(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(changed, value))
        return change(value) if isinstance(value, str) else value

    for key, value in config.to_dict().items():
        config[key] = changed(value)


def find_config(name: str) -> Path:
    """The path of a config named by path, or by bare name among the configs of the package."""
    if Path(name).is_file():
        if Path(name).suffix not in (".py", ".json", ".yaml", ".yml"):
            raise InputError(f"{name} is no config, which is a .py file or the name of an installed one; the config comes first")
        return Path(name)
    installed = {path.stem: path for path in Path(str(files("zoo.configs"))).rglob("*.py")
                 if "_base_" not in path.parts and path.stem != "__init__"}
    if name in installed:
        return installed[name]
    near = near_misses(Path(name).stem, installed)
    if timm.is_model(name):
        raise InputError(f"{name} is a model, and no config is called so; on data of your own it is trained by zoo train {name} DATA{near}")
    raise InputError(f"there is no config {name}{near}")


def _check_read(config: Config, option: str) -> None:
    """Raises InputError for an option that changes what nothing reads any more once the config's file has been read."""
    name = option.partition("=")[0].partition(".")[0]
    if name in ARGUMENTS:
        raise InputError(f"{option} is without effect in the config; {ARGUMENTS[name]}")
    if name in config and name not in TOP_LEVEL:
        used = _places(config, config[name])
        where = f"its value stands in {', '.join(used[:3])}" if used else "other keys were made from it"
        raise InputError(f"{option} is without effect: {name} is a variable of the config's file, and {where}; change that, or write a "
                         "config of your own that inherits from this one")


def _places(config: Config, wanted: object) -> list[str]:
    """Where in what is read of the config `wanted` stands."""
    found: list[str] = []

    def look(value: object, place: str) -> None:
        if value == wanted and type(value) is type(wanted):
            found.append(place)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                look(item, f"{place}.{key}" if place else str(key))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                look(item, f"{place}.{index}")

    look({key: value for key, value in config.items() if key in TOP_LEVEL}, "")
    return found


def _check_root_read(config: Config) -> None:
    """Raises InputError unless some data lie below the config's data_root."""
    found: list[str] = []

    def collect(text: str) -> str:
        found.append(text)
        return text

    datasets = {part: (config.get(f"{part}_dataloader") or {}).get("dataset") for part in PARTS}
    change_texts(Config({"datasets": {part: dataset for part, dataset in datasets.items() if dataset}}), collect)
    if not any(f"{text}/".startswith(f"{config.data_root.rstrip('/')}/") for text in found):
        kinds = ", ".join(sorted({dataset.type for dataset in datasets.values() if dataset}))
        raise InputError(f"data_root={config.data_root} is without effect: {kinds} of {Path(config.filename).stem} reads no files below a "
                         "folder; a recipe such as biformer_tiny_in1k (class folders), attention_unet_folders (masks) or "
                         "attention_unet3d_folders (volumes) does")


def _apply(config: Config, option: str) -> None:
    key, equals, text = option.partition("=")
    if not equals or not key:
        raise InputError(f"--cfg-options takes KEY=VALUE, not {option!r}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    value = ConfigDict(value) if isinstance(value, dict) else value
    *parents, last = key.split(".")
    node = config
    for name in parents:
        node = _step(node, name, key)
    old = _step(node, last, key) if isinstance(node, list | tuple) else node.get(last) if isinstance(node, Mapping | Config) else node
    if not _same_kind(old, value):
        raise InputError(f"{option}: the value in the config is {old!r}, which {value!r} cannot replace")
    if isinstance(node, list):
        node[int(last)] = value
    elif isinstance(node, Mapping | Config):
        cast(dict, node)[last] = value
    else:
        raise InputError(f"there is no {key} in the config: {'.'.join(parents)} is {node!r}")


def _step(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list | tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise InputError(f"there is no {key} in the config: {name} is no index below {len(node)}")
        return node[int(name)]
    known = list(node) if isinstance(node, Mapping | Config) else []
    if name not in known:
        raise InputError(f"there is no {key} in the config: {name} is unknown{near_misses(name, known)}")
    return node[name]


def _same_kind(old: object, new: object) -> bool:
    if old is None or new is None:
        return True
    kinds = (bool, Number, str, Mapping, list | tuple)
    return next((isinstance(new, kind) for kind in kinds if isinstance(old, kind)), True)


@dataclass
class Block:
    """A dict of the config that says what to build: its place, the registry of its `type`, and keys beside arguments."""

    place: str
    values: Mapping
    registry: Registry | None = None
    default: Callable | str | None = None
    also: Iterable[str] = ()


def check_config(config: Config, known: set[str]) -> None:
    """Raises InputError unless every key of the config is among `known`, and every argument known to its class."""
    _reject_unknown("the config", config, known)
    if not isinstance(report := config.get("report", False), bool):
        raise InputError(f"report in the config is {report!r}, where True or False is needed")
    for block in _blocks(config):
        if not isinstance(block.values, Mapping):
            raise InputError(f"{block.place} in the config is {block.values!r}, where a dict is needed")
        known = set(block.also)
        if block.registry is not None:
            name = block.values.get("type", block.default)
            known |= {"type", "_scope_", *_known_arguments(_find(block.registry, name, block.place))}
        elif block.default is not None:
            known |= _known_arguments(block.default)
        _reject_unknown(block.place, block.values, known)


def _reject_unknown(place: str, given: Iterable[str], known: set[str]) -> None:
    for key in given:
        if key not in known:
            own = "; a variable of your own begins with an underscore" if place == "the config" else ""
            near = near_misses(key, known) or f"; known are {', '.join(sorted(known))}"
            raise InputError(f"{place} has an unknown key {key!r}{near}{own}")


def _blocks(config: Config) -> Iterator[Block]:
    yield Block("model", config.get("model", {}), MODELS)
    for part in PARTS:
        yield from _data_blocks(part, config)
    if wrapper := config.get("optim_wrapper"):
        yield Block("optim_wrapper", wrapper, OPTIM_WRAPPERS, "OptimWrapper", ("optimizer", "constructor", "paramwise_cfg", "clip_grad"))
        yield Block("optim_wrapper.optimizer", wrapper.get("optimizer", {}), OPTIMIZERS)
        _find(OPTIM_WRAPPER_CONSTRUCTORS, wrapper.get("constructor", "DefaultOptimWrapperConstructor"), "optim_wrapper.constructor")
        if clip := wrapper.get("clip_grad"):
            function = clip_grad_value_ if clip.get("type") == "value" else clip_grad_norm_
            yield Block("optim_wrapper.clip_grad", clip, None, function, ("type",))
    for place, scheduler in _numbered("param_scheduler", config.get("param_scheduler")):
        yield Block(place, scheduler, PARAM_SCHEDULERS, also=("convert_to_iter_based",))
    for name, hook in (config.get("default_hooks") or {}).items():
        if hook is not None:
            yield Block(f"default_hooks.{name}", hook, HOOKS, also=("priority",))
    for place, hook in _numbered("custom_hooks", config.get("custom_hooks")):
        yield Block(place, hook, HOOKS, also=("priority",))
    if visualizer := config.get("visualizer"):
        yield Block("visualizer", visualizer, VISUALIZERS)
        for place, backend in _numbered("visualizer.vis_backends", visualizer.get("vis_backends")):
            yield Block(place, backend, VISBACKENDS)
    yield Block("log_processor", config.get("log_processor") or {}, LOG_PROCESSORS, "LogProcessor")
    yield Block("env_cfg", config.get("env_cfg") or {}, also=("cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"))
    yield Block("randomness", config.get("randomness") or {}, None, Runner.set_randomness)
    yield Block("auto_scale_lr", config.get("auto_scale_lr") or {}, also=("enable", "base_batch_size"))


def _data_blocks(part: str, config: Config) -> Iterator[Block]:
    if loader := config.get(f"{part}_dataloader"):
        place = f"{part}_dataloader"
        yield Block(place, loader, None, DataLoader, ("num_batch_per_epoch", "disable_subprocess_warning"))
        yield Block(f"{place}.dataset", loader.get("dataset", {}), DATASETS)
        yield Block(f"{place}.sampler", loader.get("sampler", {}), DATA_SAMPLERS)
    if loop := config.get(f"{part}_cfg"):
        default = {"train": "EpochBasedTrainLoop" if loop.get("by_epoch", True) else "IterBasedTrainLoop",
                   "val": "ValLoop", "test": "TestLoop"}[part]
        yield Block(f"{part}_cfg", loop, LOOPS, default, ("by_epoch",))
    for place, metric in _numbered(f"{part}_evaluator", config.get(f"{part}_evaluator")):
        yield Block(place, metric, METRICS)


def _numbered(place: str, values: Mapping | Sequence | None) -> Iterator[tuple[str, Mapping]]:
    if isinstance(values, Mapping):
        yield place, values
    else:
        yield from ((f"{place}.{index}", value) for index, value in enumerate(values or ()))


def _find(registry: Registry, name: object, place: str) -> type:
    with registry.switch_scope_and_registry(None) as scoped:
        if isinstance(name, str) and (found := scoped.get(name)) is not None:
            return found
    if isinstance(name, type):
        return name
    what = f"has an unknown type {name!r}" if name else "has no type"
    raise InputError(f"{place} in the config {what}{near_misses(str(name), {**registry.module_dict, **scoped.module_dict})}")


def _known_arguments(target: Any) -> set[str]:
    """The names that can be passed to a function, or to a class and, where it hands on keywords, its bases."""
    known: set[str] = set()
    for owner in (target.__mro__ if isinstance(target, type) else (target,)):
        if isinstance(target, type) and "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__ if isinstance(owner, type) else owner).parameters.values()
        known |= {parameter.name for parameter in parameters if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)}
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    return known - {"self"}
