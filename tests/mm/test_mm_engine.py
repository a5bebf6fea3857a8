"""What the engine is to others: importing or using zoo.mm changes nothing of it for the rest of the process."""
import subprocess
import sys

import pytest
import timm
import torch
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.fileio.io import backend_instances
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import _load_checkpoint
from short_runs import TINY

from zoo import checkpoints
from zoo.errors import InputError
from zoo.mm import corruptions, training
from zoo.mm.checkpoint import AtomicBackend, safe_files

STATE = """
import json, logging, os, random, signal, sys, warnings
import mmengine.runner, mmengine.hooks, mmengine.optim, mmengine.visualization, mmengine.evaluator, mmengine.model
import numpy, timm, torch, torchvision
from mmengine.config import utils
from mmengine.fileio import backends, handlers, io
from mmengine.registry import DefaultScope, registry
from mmengine.runner import CheckpointLoader

def state():
    settings = [getattr(torch, name)() for name in (
        "get_num_threads", "get_num_interop_threads", "get_default_dtype", "get_default_device", "get_float32_matmul_precision",
        "are_deterministic_algorithms_enabled", "is_grad_enabled", "is_inference_mode_enabled", "is_anomaly_enabled")]
    return {name: str(value) for name, value in {
        "loaders": CheckpointLoader._schemes, "loading": vars(CheckpointLoader), "writers": backends.backends,
        "prefixes": backends.prefix_to_backends, "opened": io.backend_instances, "handlers": handlers.file_handlers,
        "packages": utils.MODULE2PACKAGE, "scopes": DefaultScope._instance_dict, "imported": registry.get_object_from_string,
        "torch": settings, "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "load": (torch.load, torch.save, torch.serialization.get_safe_globals()), "start": torch.multiprocessing.get_start_method(True),
        "warnings": warnings.filters, "environment": dict(os.environ), "path": sys.path, "hooks": (sys.excepthook, sys.meta_path),
        "logging": (logging.root.level, logging.root.handlers, logging.root.manager.disable),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "recursion": sys.getrecursionlimit(),
    }.items()}
"""
IMPORT = STATE + """
before = state()
import zoo.mm
after = state()
print(*(name for name in before if before[name] != after[name]))
"""
USER = """
import torch
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from torch.utils.data import DataLoader

class Users(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs, mode="tensor"):
        return {"loss": self.weight ** 2} if mode == "loss" else []

def run(folder):
    runner = Runner(Users(), folder, load_from="torchvision://mine", log_level="ERROR", train_dataloader=DataLoader([(torch.zeros(1),)]),
                    train_cfg={"by_epoch": True, "max_epochs": 1}, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.0}})
    runner.train()
    return float(runner.model.weight)
"""


def test_importing_changes_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"changed: {done.stdout}"


def test_a_users_own_runner_works_as_without_us(tmp_path):
    """Its loader of an address, in the place of the engine's, is asked; its files are the engine's."""
    code = USER + f"""
import zoo.mm
CheckpointLoader.register_scheme("torchvision://", lambda name, map_location: {{"state_dict": {{"weight": torch.tensor(7.0)}}}}, force=True)
CheckpointLoader._schemes["torchvision://"].__name__ = "load_from_users"
print(run({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["7.0"], done.stderr
    assert torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]["weight"] == 7


def test_inside_a_run_no_loader_of_the_engine_is_left_and_files_are_whole(tmp_path):
    before = dict(CheckpointLoader._schemes)
    with safe_files():
        assert [loader.__module__ for loader in CheckpointLoader._schemes.values()] == ["zoo.mm.checkpoint"]
        for name in ("https://example.invalid/a.pth", "torchvision://resnet50", "open-mmlab://x"):
            with pytest.raises(InputError):
                _load_checkpoint(name)
        for backend in (get_file_backend(tmp_path), get_file_backend(tmp_path, backend_args={"backend": "local"}),
                        get_file_backend(tmp_path, enable_singleton=True)):
            assert type(backend) is AtomicBackend
    assert dict(CheckpointLoader._schemes) == before and len(before) > 5
    assert type(get_file_backend(tmp_path)) is type(get_file_backend(tmp_path, enable_singleton=True)) is LocalBackend
    assert not any(isinstance(backend, AtomicBackend) for backend in backend_instances.values())


def test_training_and_evaluating_are_such_runs_and_leave_nothing_of_it(tiny_train, monkeypatch):
    inside = []

    def noticed(name: str):
        method = getattr(training.Runner, name)

        def noticing(runner):
            inside.append((name, list(CheckpointLoader._schemes), type(get_file_backend(runner.work_dir))))
            return method(runner)
        monkeypatch.setattr(training.Runner, name, noticing)

    for name in ("train", "test"):
        noticed(name)
    before, threads = dict(CheckpointLoader._schemes), torch.get_num_threads()
    _, metrics, folder = tiny_train("run")
    assert training.evaluate("biformer_nano_digits", folder / "epoch_2.pth", cfg_options=TINY) == metrics
    with pytest.raises(InputError):
        training.evaluate("biformer_nano_digits", "nowhere.pth")
    assert inside == [("train", [""], AtomicBackend), ("test", [""], AtomicBackend)]
    assert dict(CheckpointLoader._schemes) == before and type(get_file_backend(folder)) is LocalBackend
    assert torch.get_num_threads() == threads


class Counted:
    """Counts calls of a function, and makes them."""

    def __init__(self, monkeypatch, owner: object, name: str):
        self.calls, self.function = 0, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def test_the_corruption_run_reads_and_builds_once_with_the_numbers_of_single_runs(tiny_train, monkeypatch):
    _, _, folder = tiny_train("run", "train_cfg.max_epochs=1", "train_cfg.val_interval=1")
    monkeypatch.setattr(corruptions, "CORRUPTIONS", ("gaussian_noise", "glass_blur"))
    monkeypatch.setattr(corruptions, "SEVERITIES", (1, 4))
    path = folder / "epoch_1.pth"
    expected = {name: [100 - training.evaluate("biformer_nano_digits", path, cfg_options=[
        *TINY, f"test_dataloader.dataset.corruption={ {'name': name, 'severity': severity} }"])["accuracy/top1"] for severity in (1, 4)]
        for name in corruptions.CORRUPTIONS}
    reads, builds = Counted(monkeypatch, checkpoints, "read"), Counted(monkeypatch, timm, "create_model")
    found = corruptions.evaluate_corruptions("biformer_nano_digits", path, cfg_options=TINY)
    assert dict(found.errors) == expected
    assert (reads.calls, builds.calls) == (1, 1)


@pytest.mark.parametrize("arguments", [["predict"], ["export"], ["test", "biformer_nano_digits"]])
def test_programs_read_the_checkpoint_once(arguments, tiny_train, monkeypatch, tmp_path):
    from PIL import Image

    from zoo.exporting import onnx
    from zoo.tools._cli import command

    _, _, folder = tiny_train("run", "train_cfg.max_epochs=1", "train_cfg.val_interval=1")
    picture = tmp_path / "a.png"
    Image.new("L", (40, 40)).save(picture)
    more = {"predict": [picture], "export": ["-o", tmp_path / "a.onnx"], "test": ["--cfg-options", *TINY]}[arguments[0]]
    reads = Counted(monkeypatch, checkpoints, "read")
    monkeypatch.setattr(onnx, "export_onnx", lambda *_, **__: (_ for _ in ()).throw(InputError("enough")))
    with pytest.raises(SystemExit):
        command([*arguments, *map(str, (folder / "epoch_1.pth", *more))])
    assert reads.calls == 1
