"""The checkout is the package, and so is what a stranger installs; what importing it costs."""
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jedi
import pytest

import zoo

ROOT = Path(__file__).parents[1]
ROOMS = {"zoo": ".", "kernels": "kernels", "layers": "layers", "configs": "configs", "tools": "tools"}  # folders, and where below `zoo`
NOT_SOURCES = shutil.ignore_patterns(".git", ".venv", "build", "work_dirs", "data", "tests", "*.egg-info", "__pycache__", ".*cache")
BUILD = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w"]
RUN = """
import json, pathlib, timm, torch, zoo, zoo.configs, zoo.kernels, zoo.layers, zoo.tools
model = timm.create_model("biformer_nano", num_classes=3)
configs = [p.name for p in pathlib.Path(zoo.configs.__path__[0]).rglob("*_digits.py")]
files = [zoo.__file__, zoo.layers.__file__, zoo.kernels.__file__, zoo.tools.__file__, *zoo.configs.__path__]
print(json.dumps([list(model(torch.randn(1, 3, 40, 30)).shape), configs, files]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy to build from: building leaves files beside the sources."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "zoo", symlinks=True, ignore=NOT_SOURCES))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*BUILD, folder, source], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    return target


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone, with what has been changed since the last commit."""
    folder = tmp_path_factory.mktemp("clone") / "zoo"
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    if changes := subprocess.run(["git", "diff", "--binary", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout:
        subprocess.run(["git", "apply", "--index"], cwd=folder, input=changes, check=True)
    return folder


def python(code: str, **kwargs) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs).stdout


def check_runs(folder: Path, package: Path, paths: list[Path]) -> None:
    """Runs a model in `folder` with `paths` on PYTHONPATH; all of `zoo` has to be what is below `package`."""
    shape, configs, files = json.loads(python(RUN, cwd=folder, env={"PYTHONPATH": ":".join(map(str, paths)), "PATH": "/usr/bin:/bin"}))
    assert shape == [1, 3] and "biformer_nano_digits.py" in configs
    assert all(file.startswith(f"{package}/") for file in files)


def test_a_fresh_clone_is_the_package(clone, installed):
    """Whatever else is there: a wheel that was installed, another checkout, and the one that this environment knows."""
    check_runs(clone, clone, [installed, ROOT])


def test_an_installed_wheel_works_anywhere(installed, tmp_path):
    check_runs(tmp_path, installed, [installed])
    command = [sys.executable, installed / "bin" / "zoo", "models", "biformer_n?no", "--details"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(installed)}).stdout
    assert "\nbiformer_nano  routing" in listed


@pytest.mark.parametrize("broken", [False, True])
def test_a_clone_tests_its_own_files(clone, broken):
    """With the environment of this checkout."""
    layer = clone / "layers" / "das.py"
    sound = layer.read_text()
    if broken:
        layer.write_text(f"{sound}\ndef\n")
    try:
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/layers/test_das.py", "-k", "bad_arguments"]
        run = subprocess.run(command, check=False, cwd=clone, capture_output=True, text=True)
    finally:
        layer.write_text(sound)
    assert run.returncode == (2 if broken else 0), run.stdout + run.stderr
    assert not broken or f"{clone}/zoo/layers/das.py" in run.stdout + run.stderr


def test_the_wheel_holds_what_is_used_and_nothing_else(wheel):
    models = (str(path.relative_to(ROOT)) for path in ROOT.glob("zoo/yolo/models/*"))
    expected = {"zoo/py.typed", "zoo/kernels/configurations.json", *models}
    for folder, place in ROOMS.items():
        expected |= {str(Path("zoo", place, path.relative_to(ROOT / folder))) for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


def test_a_wheel_from_the_sdist_holds_the_same(wheel, source, tmp_path):
    subprocess.run([sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"],
                   cwd=source, check=True, capture_output=True)
    subprocess.run([*BUILD, tmp_path, *tmp_path.glob("*.tar.gz")], check=True)
    again, = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("room", ["layers", "kernels"])
def test_editors_find_every_public_name(room):
    """What goes to the definition, completes and checks types follows names without running anything."""
    project = jedi.Project(ROOT)
    names = getattr(zoo, room).__all__
    assert {"layers": "DAS", "kernels": "deform_conv2d"}[room] in names
    for name in names:
        line = f"zoo.{room}.{name}"
        script = jedi.Script(f"import zoo.{room}\n{line}", path=ROOT / "user.py", project=project)
        found, = script.goto(2, len(line), follow_imports=True)
        assert found.module_path.resolve().is_relative_to(ROOT / room) and found.type in ("class", "function"), name


STATE = """
import json, logging, os, random, sys, warnings
import numpy, torch, torchvision, timm
def state():
    return {
        "environment": dict(os.environ), "path": list(sys.path), "finders": list(map(repr, sys.meta_path)), "folder": os.getcwd(),
        "warnings": repr(warnings.filters), "logging": [repr(logging.root.handlers), logging.root.level],
        "generators": [repr(random.getstate()), repr(numpy.random.get_state()), torch.get_rng_state().tolist()],
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
                  torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "others' models": [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.split(".")[0] != "zoo"]}
before, modules = state(), set(sys.modules)
import zoo
after = state()
print(json.dumps([sorted(set(sys.modules) - modules), [name for name in before if before[name] != after[name]]]))
"""


def test_import_needs_only_torch_torchvision_and_timm_and_changes_nothing_else():
    modules, changed = json.loads(python(STATE))
    new = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert not {name for name in new if not name.startswith("__editable__")} - {"zoo", "torch", "torchvision", "timm"}
    assert not changed


def test_rooms_wait_for_what_only_some_of_their_work_needs():
    """Neither the engine nor what the extras install is imported with any module below zoo.mm and zoo.yolo."""
    code = """
import importlib, pkgutil, sys, zoo
for room in pkgutil.iter_modules(zoo.__path__):
    if room.name not in ("mm", "yolo", "tools", "configs"):
        module = importlib.import_module(f"zoo.{room.name}")
        for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{module.__name__}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
    imported = set(python(code).split())
    assert not imported & {
        "mmengine", "mmcv", "mmdet", "mmseg", "monai", "nilearn", "nibabel", "sklearn", "matplotlib", "captum", "pytorch_grad_cam",
        "onnx", "onnxruntime", "imagecorruptions", "cv2", "supervision", "transformers", "ultralytics"}


def test_the_checkout_on_the_path_is_not_the_hubs_package_of_kernels():
    """transformers looks for one of that name, whose `get_kernel` it takes."""
    assert python("import zoo, kernels; print(hasattr(kernels, 'routing_attention'))", cwd=ROOT).strip() == "False"


def test_what_users_write_stays():
    """Names at the top, whatever room they come from."""
    code = """
from zoo import AttentionDiversificationLoss, attach, attnet, biformer, capture, das, deit, fan, halonet, list_models, litv2
from zoo import MECHANISMS, REPORTED_TOP1, __version__, mechanism_of, polarized, sknet, transnext, unet
import zoo
assert zoo.attach is attach and zoo.capture is capture and callable(attach) and callable(capture) and callable(list_models)
assert zoo.losses.AttentionDiversificationLoss is AttentionDiversificationLoss is zoo.AttentionDiversificationLoss
families = attnet, biformer, das, deit, fan, halonet, litv2, polarized, sknet, transnext, unet
print(all(family.__name__ == f"zoo.models.{name}" and getattr(zoo, name) is family
          for name, family in ((family.__name__.rpartition(".")[2], family) for family in families)))
"""
    assert python(code) == "True\n"
