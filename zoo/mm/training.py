"""Training and evaluation of a config by mmengine's Runner."""
import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import print_log
from mmengine.optim import build_optim_wrapper
from mmengine.registry import METRICS, MODELS
from torch import nn
from torch.utils.data import DataLoader, Dataset

from zoo.checkpoints import one_line, without
from zoo.errors import InputError
from zoo.measuring.per_class import Row
from zoo.mm.backbone import TimmBackbone
from zoo.mm.checkpoint import (
    OtherClassesHook,
    check_fits,
    latest_checkpoint,
    load_from_local,
    recorded_classes,
    remove_unfinished,
    safe_files,
)
from zoo.mm.classifier import ImageClassifier
from zoo.mm.config import PARTS, change_texts, load_config, scope
from zoo.mm.data_checks import build_dataset, check_channels, check_channels_of_data, check_dataset
from zoo.mm.downstream import SOURCES
from zoo.mm.fixations import FixationPredictor
from zoo.mm.hooks import LastMetricsHook
from zoo.mm.networks import plain
from zoo.mm.per_class import class_table
from zoo.mm.restorer import Restorer
from zoo.mm.runner import Runner, unlogged, warnings_in_the_log
from zoo.mm.saliency import Cutter
from zoo.mm.segmentor import Segmentor
from zoo.mm.toolbox_operators import operators_in_float32
from zoo.reading.class_names import check_same_classes
from zoo.threads import torch_threads
from zoo.toolboxes import TOOLBOXES

# Which variables tell a process its rank, the number of processes, and its rank on this machine.
LAUNCHERS = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}

# Keys of a data loader that are no arguments of PyTorch's, or not yet.
BUILT_BY_ENGINE = (
    "dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn", "num_batch_per_epoch", "disable_subprocess_warning")

# Parts of a model whose `num_classes` is that of the data: the model itself, and these of its heads.
CLASSIFYING = re.compile(r"\.((bbox|mask|decode|auxiliary)_head(\.\d+)?)?$")

Built = TypeVar("Built")


@safe_files()
def train(config: str | Path, *, work_dir: str | Path | None = None, resume: str | Path | None = None, amp: bool = False,
          launcher: str | None = None, seed: int | None = None, cfg_options: Sequence[str] = ()) -> tuple[Path, dict[str, float]]:
    """Trains a config and returns the folder that it wrote and the metrics of the last evaluation.

    Args:
        config: path, or name of an installed config.
        work_dir: where to write; by default the config's own, or work_dirs/NAME.
        resume: a checkpoint to go on from, or "auto" for the newest in the work dir, if there is one.
        amp: mixed precision.
        launcher: "none", "pytorch", "slurm" or "mpi"; None to see whether torchrun started this process.
        seed: replaces the config's.
        cfg_options: changes to the config, as `zoo.mm.config.load_config` takes them.

    Where the config has `report=True`, the folder also holds the page that `zoo.mm.report.write_report` writes.

    Raises InputError, before anything is written, for whatever of that cannot be used.
    """
    settings, work_dir = _prepare(config, work_dir, cfg_options)
    if settings.get("train_dataloader") is None:
        raise InputError(f"the config {settings.filename} has no train_dataloader")
    for key in ("max_epochs", "max_iters"):
        if settings.train_cfg.get(key, 1) < 1:
            raise InputError(f"train_cfg.{key} is {settings.train_cfg[key]}; it has to be at least 1")
    if amp:
        settings.optim_wrapper.type = "AutocastOptimWrapper"
    if seed is not None:
        settings.randomness = {**settings.get("randomness", {}), "seed": seed}
    if scale := settings.get("auto_scale_lr"):  # the engine counts the images of a step without accumulation
        scale.base_batch_size /= settings.optim_wrapper.get("accumulative_counts", 1)
    settings.param_scheduler = [scheduler for scheduler in settings.get("param_scheduler") or [] if not _too_late(scheduler, settings)]
    checkpoint = latest_checkpoint(work_dir) if resume == "auto" else resume
    settings.resume = checkpoint is not None
    settings.load_from = str(checkpoint) if checkpoint else settings.get("load_from")
    if settings.resume:
        _forget_sources(settings)

    model = _build_model(settings)
    classes = _check_data(settings, PARTS[:2], model)
    if not settings.resume:
        read_start(model)
    optim_wrapper = _build("optim_wrapper", lambda: build_optim_wrapper(model, settings.optim_wrapper))
    others: OtherClassesHook | None = None
    if settings.load_from:
        if not settings.resume and (known := recorded_classes(load_from_local(settings.load_from))) and known != list(map(str, classes)):
            others = OtherClassesHook(_telling_classes_apart(settings, model), known)
        check_fits(settings.load_from, model, whole=settings.resume, classes=classes,
                   optim_wrapper=optim_wrapper if settings.resume else None)
    _start_processes(settings, launcher)
    remove_unfinished(work_dir)
    toolbox = settings.get("default_scope")
    operators = operators_in_float32(toolbox) if toolbox in TOOLBOXES else contextlib.nullcontext()
    with torch_threads(_threads(settings)), operators, warnings_in_the_log():
        runner = Runner.from_cfg(settings)
        last = LastMetricsHook()
        for hook in filter(None, (last, others)):
            runner.register_hook(hook)
        in_one_sentence(runner.train)
        if last.metrics is None and runner.val_loop is not None:  # resumed after the last epoch
            runner.val_loop.run()
    first = is_main_process()
    _end_processes()
    if first and settings.get("report"):
        _report(work_dir)
    return work_dir, last.metrics or {}


def _report(work_dir: Path) -> None:
    """Writes report.html. Whatever goes wrong with it is a sentence: the training is done, and stays."""
    try:
        from zoo.mm.report import write_report  # with what it draws and measures with, which other runs do not wait for

        print(f"report: {write_report(work_dir)}", flush=True)
    except Exception as error:
        print_log(f"the training is complete, but its report could not be written: {one_line(error)}; `zoo report {work_dir}` tries again",
                  "current", logging.ERROR)


def evaluate(config: str | Path, checkpoint: str | Path, *, launcher: str | None = None,
             cfg_options: Sequence[str] = ()) -> dict[str, float]:
    """The metrics of a checkpoint on the test data of its config; leaves no files. Arguments and errors as in `train`."""
    metrics, = evaluate_each(config, checkpoint, [()], launcher=launcher, cfg_options=cfg_options)
    return metrics


def evaluate_classes(config: str | Path, checkpoint: str | Path, *, launcher: str | None = None,
                     cfg_options: Sequence[str] = ()) -> tuple[dict[str, float], list[Row]]:
    """As `evaluate`, and a row of numbers for each class, see `zoo.mm.per_class`: in the first process, others get what they have."""
    table = class_table(load_config(config, cfg_options))
    metrics, = evaluate_each(config, checkpoint, [()], launcher=launcher, cfg_options=cfg_options, also=[table])
    return metrics, getattr(table, "rows", [])


def evaluate_each(config: str | Path, checkpoint: str | Path, changes: Iterable[Sequence[str]], *, launcher: str | None = None,
                  cfg_options: Sequence[str] = (), also: Sequence[BaseMetric] = ()) -> Iterator[dict[str, float]]:
    """As `evaluate`, once for each of `changes`, further options that change the test data and nothing of the model.

    The checkpoint is read, and its model built, one time for all of them. `also` are metrics beside those of the config.
    """
    model, classes = None, []
    try:
        for change in changes:
            with safe_files():
                changed = _test_config(config, [*cfg_options, *change], launcher)
                if model is None:
                    model = _build_model(changed)
                    classes = _check_data(changed, PARTS[2:], model)
                    model.load_state_dict(check_fits(checkpoint, model, whole=True, classes=classes), strict=False)
                else:
                    check_same_classes(_check_data(changed, PARTS[2:], model), "the changed test data", classes, "those before")
                _join_processes(changed)
                metrics = _test(changed, model, also)
            yield metrics
    finally:
        _end_processes()


def _test_config(config: str | Path, cfg_options: Sequence[str], launcher: str | None) -> Config:
    """The config with what testing takes, and nothing else."""
    settings, _ = _prepare(config, None, cfg_options)
    if settings.get("test_dataloader") is None:
        raise InputError(f"the config {settings.filename} has no test_dataloader")
    for part in PARTS[:2]:
        for key in ("dataloader", "cfg", "evaluator"):
            settings.pop(f"{part}_{key}", None)
    for key in ("optim_wrapper", "param_scheduler", "visualizer"):
        settings.pop(key, None)
    settings.custom_hooks = [{"type": "FiniteHook"}, {"type": "ScreenHook"}]
    settings.get("default_hooks", {}).pop("visualization", None)  # the toolboxes' draws pictures
    settings.load_from, settings.resume = None, False
    _forget_sources(settings)
    if preprocessor := settings.get("data_preprocessor"):  # the engine puts it into a model that it builds
        settings.model.setdefault("data_preprocessor", preprocessor)
    _choose_launcher(settings, launcher)
    return settings


def _test(config: Config, model: nn.Module, also: Sequence[BaseMetric]) -> dict[str, float]:
    class GivenModelRunner(Runner):
        def build_model(self, described: Mapping) -> nn.Module:
            return model

        def build_evaluator(self, evaluator: Any) -> Evaluator:
            built = super().build_evaluator(evaluator)
            built.metrics += also
            return built

    with tempfile.TemporaryDirectory() as folder:
        config.work_dir = folder
        config.experiment_name = Path(folder).name  # of its own: the engine would tell runs apart by the second
        with warnings_in_the_log():
            metrics = in_one_sentence(GivenModelRunner.from_cfg(config).test)
    vars(model).pop("test_step", None)  # where the config asks to compile, the engine leaves the compiled one
    return metrics


def _prepare(name: str | Path, work_dir: str | Path | None, cfg_options: Sequence[str]) -> tuple[Config, Path]:
    config = load_config(name, cfg_options)
    work_dir = Path(work_dir or config.get("work_dir") or Path("work_dirs") / Path(config.filename).stem)
    existing = next(folder for folder in (work_dir.absolute(), *work_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "read-only" if existing.is_dir() else "a file"
        raise InputError(f"nothing can be written to the work dir {work_dir}: {existing} is {why}")
    config.work_dir = str(work_dir)
    return config, work_dir


def _forget_sources(config: Config) -> None:
    """All weights come from a checkpoint: neither are those read, nor those downloaded, that training started from."""
    config.model = without(plain(config.model), SOURCES)


def check_model(config: Config) -> None:
    """Raises InputError unless the model of a config can be built, and the weights that it starts from can be read."""
    read_start(_build_model(config))


def read_start(model: nn.Module) -> None:
    """Reads the weights that the model starts from. Raises InputError for files that do not hold them."""
    for part in model.modules():
        if isinstance(part, TimmBackbone | FixationPredictor | ImageClassifier | Restorer | Segmentor | Cutter):
            part.init_weights()


def _too_late(scheduler: Mapping, config: Config) -> bool:
    """Whether a run that was made short ends before the scheduler begins, which the engine takes for a mistake."""
    limit = config.train_cfg.get("max_epochs" if scheduler.get("by_epoch", True) else "max_iters", float("inf"))
    return scheduler.get("begin", 0) >= limit


def _build_model(config: Config) -> nn.Module:
    with scope(config), unlogged():
        model = _build("model", lambda: MODELS.build(config.model))
    check_channels(model)
    return model


def _telling_classes_apart(config: Config, model: nn.Module) -> set[str]:
    """The names of those of the model's weights that would have another shape if there were more classes."""
    def more(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: cast(int, item) + 1 if key == "num_classes" else more(item) for key, item in value.items()}
        return type(value)(map(more, value)) if isinstance(value, list | tuple) else value

    described = without(plain(config.model), SOURCES)
    if "name" in described:  # of a network that may have as many classes as it has by default
        described["args"] = {"num_classes": model.num_classes, **(described.get("args") or {})}
    with scope(config), unlogged():
        other = MODELS.build(ConfigDict(cast(dict, more(described))))
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    return {name for name, value in model.state_dict().items() if value.shape != shapes[name]}


def _check_data(config: Config, parts: Sequence[str], model: nn.Module) -> list[str]:
    """Builds the datasets and metrics once, compares their classes with each other and the model, and returns them."""
    known: tuple[str, list[str]] | None = None
    with scope(config), unlogged():
        for part in parts:
            evaluators = config.get(f"{part}_evaluator") or []
            evaluators = evaluators if isinstance(evaluators, list) else [evaluators]
            if loader := config.get(f"{part}_dataloader"):
                dataset = _build(f"{part}_dataloader.dataset", lambda loader=loader, part=part: build_dataset(part, loader.dataset))
                options = {key: value for key, value in loader.items() if key not in BUILT_BY_ENGINE}
                _build(f"{part}_dataloader", lambda options=options: DataLoader(cast(Dataset, [0]), **options))
                check_dataset(part, loader.dataset, dataset, evaluators)
                classes = list(dataset.metainfo["classes"])
                if known is not None:
                    check_same_classes(classes, f"the {part} data", known[1], f"the {known[0]} data")
                known = known or (part, classes)
                _check_classes(model, part, len(classes))
                check_channels_of_data(model, part, dataset)
            for metric in evaluators:
                _build(f"{part}_evaluator", lambda metric=metric: METRICS.build(metric))
    return known[1] if known else []


def _check_classes(model: nn.Module, part: str, classes: int) -> None:
    """Raises InputError unless the model, and those of its heads that name classes, know as many as the data."""
    for place, head in model.named_modules():
        found = getattr(head, "num_classes", None)
        if found not in (None, classes) and CLASSIFYING.search(f".{place}"):
            setting = "args" if place == "" else place
            raise InputError(f"the model has {found} classes, the {part} data {classes}; set model.{setting}.num_classes")


def _build(place: str, build: Callable[[], Built]) -> Built:
    try:
        return build()
    except InputError:
        raise
    except Exception as error:  # whatever a constructor finds wrong with its arguments
        raise InputError(f"{place} of the config cannot be built: {type(error).__name__}: {error}") from error


def in_one_sentence(work: Callable[[], Built]) -> Built:
    """What `work` gives. An InputError of a process that loads data comes with a traceback in its text; only the sentence is left."""
    try:
        return work()
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].removeprefix("zoo.errors.InputError: ")) from error


def _start_processes(config: Config, launcher: str | None) -> None:
    _choose_launcher(config, launcher)
    _join_processes(config)


def _choose_launcher(config: Config, launcher: str | None) -> None:
    """Settles `config.launcher`, and how the model is wrapped where there are no GPUs."""
    if launcher is None:
        launcher = "pytorch" if "RANK" in os.environ else "none"
    config.launcher = launcher
    if launcher == "none" or not torch.cuda.is_available():  # batch norms over processes need GPUs
        alone = launcher == "none" and config.get("default_scope") in TOOLBOXES  # the last batch of an epoch may be one picture
        norm = {"SyncBN": "SteadyBN", "BN": "SteadyBN"} if alone else {"SyncBN": "BN"}
        change_texts(config, lambda text: norm.get(text, text))
        config.pop("sync_bn", None)
    if launcher == "none":
        return
    if missing := [name for name in LAUNCHERS[launcher] if name not in os.environ]:
        raise InputError(f"the launcher {launcher} has not started this process: {', '.join(missing)} are not set")
    if not torch.cuda.is_available():
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}


def _join_processes(config: Config) -> None:
    """Without GPUs joins the processes by gloo, which the engine has no way to do."""
    if config.launcher == "none" or torch.cuda.is_available() or torch.distributed.is_initialized():
        return
    for name, source in zip(LAUNCHERS["pytorch"], LAUNCHERS[config.launcher], strict=True):
        os.environ[name] = os.environ[source]
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29500")
    torch.distributed.init_process_group("gloo")


def _threads(config: Config) -> int:
    """How many to train with: leaves cores to the workers that load data, unless OMP_NUM_THREADS says how many.

    Threads that wait for one another in small kernels take many times longer when they lack a core.
    """
    if config.launcher == "none" and "OMP_NUM_THREADS" not in os.environ:
        return max(1, len(os.sched_getaffinity(0)) - config.train_dataloader.get("num_workers", 0))
    return torch.get_num_threads()


def _end_processes() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
