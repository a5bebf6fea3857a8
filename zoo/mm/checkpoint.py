"""Checkpoints of the engine: read without running code, written so that a kill at any moment leaves a whole one."""
import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.fileio.io import backend_instances
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, Runner
from numpy._core import multiarray
from torch import Tensor, nn

from zoo import checkpoints
from zoo.attention_removal import diluted_blocks
from zoo.errors import InputError
from zoo.files import explaining
from zoo.reading.class_names import check_same_classes, shown

TEMPORARY = ".zoo-unfinished-"
STATISTICS = ("min", "max", "mean", "current")
RESUME_KEYS = ("state_dict", "epoch", "iter", "message_hub", "optimizer", "param_schedulers")


def _history_method(owner: type, name: str) -> Callable:
    """Stands in for `getattr`, by which pickle names the methods that every HistoryBuffer carries."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise UnpicklingError(f"getattr({owner}, {name!r}) is none of what the engine writes")
    return getattr(HistoryBuffer, name)


# What the engine writes beside tensors: the histories of logged numbers, NumPy arrays and scalars of int64, float32 (mmsegmentation's
# metrics, of which the best is kept) and float64.
ENGINE_CLASSES = (
    HistoryBuffer, (_history_method, "builtins.getattr"), np.ndarray, np.dtype, multiarray._reconstruct,
    multiarray.scalar, *(type(np.dtype(kind)) for kind in (np.int64, np.float32, np.float64)),
)


def load_from_local(filename: str | Path, map_location: str | torch.device | None = None) -> object:
    """What the checkpoint `filename` holds, without config text, which the engine would execute on resuming."""
    checkpoint = checkpoints.read(Path(filename).expanduser(), map_location or "cpu", allow=ENGINE_CLASSES)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("meta"), dict):
        checkpoint["meta"].pop("config", None)
    return checkpoint


class AtomicBackend(LocalBackend):
    """Local files that appear under their name only once they are complete."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        try:
            with explaining(path), os.fdopen(descriptor, "wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def remove(self, filepath: str | Path) -> None:
        """Removes a checkpoint together with the weights beside it."""
        super().remove(filepath)
        weights_beside(filepath).unlink(missing_ok=True)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        self.put(obj.encode(encoding), filepath)


def weights_beside(checkpoint: str | Path) -> Path:
    """Where the weights alone of a checkpoint are, as safetensors by the names of the network, which timm.create_model reads."""
    return Path(checkpoint).with_suffix(".safetensors")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def safe_files() -> Iterator[None]:
    """Inside, the engine reads checkpoints by `load_from_local` and writes local files by `AtomicBackend`, whoever asks it to.

    Its own loaders, all of which unpickle without restriction when the safe way fails, are there again afterwards.
    """
    with (mock.patch.object(CheckpointLoader, "_schemes", {"": load_from_local}), mock.patch.dict(backends, local=AtomicBackend),
          mock.patch.dict(prefix_to_backends, {"": AtomicBackend}), mock.patch.dict(backend_instances, clear=True)):
        yield


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink()


def latest_checkpoint(work_dir: Path) -> Path | None:
    """The newest checkpoint that training wrote into `work_dir`, or None."""
    pointer = work_dir / "last_checkpoint"
    return work_dir / Path(pointer.read_text().strip()).name if pointer.is_file() else None


def best_checkpoint(work_dir: Path) -> Path | None:
    """The best checkpoint that training kept in `work_dir`, as the newest records it; the newest where it kept none."""
    if (latest := latest_checkpoint(work_dir)) is None:
        return None
    hub = cast(dict, load_from_local(latest)).get("message_hub", {})
    named = [str(value) for name, value in hub.get("runtime_info", {}).items() if name.startswith("best_ckpt")]
    return next((path for name in named if (path := work_dir / Path(name).name).is_file()), latest)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook in an order that always leaves a usable checkpoint: write, point to it, remove old ones.

    Networks with a share of attention that is fading out (`AttentionDilutionHook`) are no candidates for the best.

    Beside every checkpoint of a network that timm knows there are its weights alone, see `weights_beside`: those that are evaluated,
    the average where one is kept. They go when the checkpoint goes.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Comes after the other hooks, so that `state_dict` is what is evaluated."""
        for state in checkpoint.get("param_schedulers", ()):  # functions among it would be refused on reading, as code
            for key in [key for key, value in state.items() if callable(value)]:
                del state[key]
        self.weights = None
        if checkpoint.get("zoo", {}).get("task") in checkpoints.TASKS:
            self.weights = {name.removeprefix(checkpoints.MODEL_PREFIX): value.clone(memory_format=torch.contiguous_format)
                            for name, value in checkpoint["state_dict"].items() if name.startswith(checkpoints.MODEL_PREFIX)}

    def _put_weights(self, checkpoint: str | Path) -> None:
        if is_main_process() and self.weights is not None:
            self.file_backend.put(safetensors.torch.save(self.weights, {"format": "pt"}), weights_beside(checkpoint))

    def before_train(self, runner: Runner) -> None:
        """Forgets the best of another folder's run, from which this one was resumed: its files are not this run's to remove."""
        super().before_train(runner)
        info = runner.message_hub.runtime_info
        if any(Path(path).absolute().parent != Path(self.out_dir).absolute() for path in self._best_paths().values()):
            for key in [key for key in info if key.startswith(("best_score", "best_ckpt"))]:
                del info[key]
            self._set_best_paths({})

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Writes the checkpoint of this step again where the metrics have changed a schedule."""
        super().after_val_epoch(runner, metrics)
        step = runner.epoch if self.by_epoch else runner.iter
        if self.last_ckpt and Path(self.last_ckpt).name == self.filename_tmpl.format(step) and any(
                getattr(scheduler, "need_val_args", False) for scheduler in cast(list, runner.param_schedulers or [])):
            self._save_checkpoint_with_step(runner, step, {"epoch": runner.epoch, "iter": runner.iter})

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best or any(diluted_blocks(cast(nn.Module, runner.model)).values()):
            return
        if unknown := set(self.key_indicators) - {"auto", *metrics}:
            raise InputError(f"default_hooks.checkpoint.save_best={unknown.pop()!r}: the evaluation gives {', '.join(metrics)}")
        before = self._best_paths()
        self._set_best_paths({})  # so that the engine does not remove them before there are others
        plain = {name: value.item() if isinstance(value, np.generic | Tensor) else value for name, value in metrics.items()}
        super()._save_best_checkpoint(runner, plain)  # which records the best, and only plain numbers are read again
        written = self._best_paths()
        self._set_best_paths({**before, **written})
        for path in written.values():
            self._put_weights(path)
        for key in before.keys() & written.keys():
            if is_main_process() and before[key] != written[key] and Path(before[key]).exists():
                self.file_backend.remove(before[key])

    def _best_paths(self) -> dict[str, str]:
        """The best checkpoint by every metric that is looked at."""
        if not self.save_best:
            return {}
        paths = {self.save_best[0]: self.best_ckpt_path} if len(self.save_best) == 1 else self.best_ckpt_path_dict
        return {key: path for key, path in paths.items() if path}

    def _set_best_paths(self, paths: dict[str, str]) -> None:
        if self.save_best and len(self.save_best) == 1:
            self.best_ckpt_path = paths.get(self.save_best[0])
        elif self.save_best:
            self.best_ckpt_path_dict = {key: paths.get(key) for key in self.save_best}

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated: set[int] = set()
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            before = set(self.keep_ckpt_ids)
            self.keep_ckpt_ids.append(step)
            outdated = before - set(self.keep_ckpt_ids)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(self.out_dir, name, save_optimizer=self.save_optimizer,
                               save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch,
                               backend_args=self.backend_args)
        self._put_weights(self.last_ckpt)
        if is_main_process():
            self.file_backend.put_text(str(self.last_ckpt), Path(runner.work_dir) / "last_checkpoint")
            for old in outdated:
                path = Path(self.out_dir, self.filename_tmpl.format(old))
                if path.exists():
                    self.file_backend.remove(path)


def check_fits(path: str | Path, model: nn.Module, *, whole: bool, classes: Sequence[str] = (),
               optim_wrapper: OptimWrapper | None = None) -> dict:
    """The weights in the checkpoint at `path`. Raises InputError unless they are weights for `model`.

    `whole`: all of them, and no others, and trained for `classes`, if the checkpoint says for which; otherwise at least one. With
    `optim_wrapper`, also what training needs to go on with it; its state is then the checkpoint's.
    """
    checkpoint = load_from_local(path)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, dict):
        raise InputError(f"{path} is not a checkpoint of `zoo train`: its state_dict is a {type(weights).__name__}")
    weights = dict(weights)
    for place, part in model.named_modules():
        if hasattr(part, "take_authors_names"):  # as loading lets it
            cast(Any, part).take_authors_names(weights, f"{place}.")
    if whole and classes and (known := recorded_classes(checkpoint)):
        check_same_classes(classes, "the data", known, f"the checkpoint {path}")
    needed = model.state_dict()
    given = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if whole and (differences := checkpoints.differences(needed, given)):
        raise InputError(f"the weights in {path} are of another model: {differences}; {checkpoints.seems(checkpoint)}")
    if not any(name in given and given[name].shape == value.shape for name, value in needed.items()):
        raise InputError(f"{path} holds no weights for this model: none of its {len(given)} tensors fits; {checkpoints.seems(checkpoint)}")
    checkpoints.check_numbers(path, weights)
    if optim_wrapper is not None:
        _check_resumable(path, checkpoint, optim_wrapper)
    return weights


@HOOKS.register_module()
class OtherClassesHook(Hook):
    """Where training starts from a checkpoint for other classes, leaves out the weights `names`, which say what is which, and says so."""

    priority = "HIGHEST"

    def __init__(self, names: Iterable[str], known: Sequence[str]):
        self.names, self.known = set(names), known

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        left = sorted(self.names & checkpoint["state_dict"].keys())
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in self.names}
        runner.logger.warning("%s knows other classes than the data, %s: %d weights that tell classes apart begin anew, such as %s",
                              runner._load_from, shown(self.known), len(left), ", ".join(left[:3]))


def recorded_classes(checkpoint: object) -> list[str]:
    """The names of the classes that a checkpoint was trained for, or none if it does not say."""
    record = checkpoint.get("zoo") if isinstance(checkpoint, dict) else None
    classes = record.get("classes") if isinstance(record, dict) else None
    return list(map(str, classes)) if isinstance(classes, list | tuple) else []


def _check_resumable(path: str | Path, checkpoint: dict, optim_wrapper: OptimWrapper) -> None:
    parts = {**checkpoint, **checkpoint["meta"]} if isinstance(checkpoint.get("meta"), dict) else checkpoint
    if missing := [key for key in RESUME_KEYS if key not in parts]:
        raise InputError(f"training cannot be resumed from {path}: it lacks {', '.join(missing)}")
    try:
        optim_wrapper.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
    except Exception as error:  # foreign state surfaces as almost any exception
        raise InputError(f"training cannot be resumed from {path}: its optimizer is not the config's: {error}") from error
