"""What a stranger installs: the wheel, and what importing it costs."""
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(".git", ".venv", "build", "work_dirs", "data", "tests", "*.egg-info", "__pycache__", ".*cache")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=NOT_SOURCES)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def python(code: str, **kwargs) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs).stdout


def test_only_zoo_lands_in_site_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"zoo"}


def test_wheel_is_whole(wheel):
    """Every module and config of the rooms is in it, whatever setup.cfg has been told of."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for room, place in (("kernels", "zoo/kernels"), ("layers", "zoo/layers"), ("zoo", "zoo"), ("configs", "zoo/configs")):
        for path in (ROOT / room).rglob("*.py"):
            assert f"{place}/{path.relative_to(ROOT / room)}" in names


def test_installed_wheel_works_anywhere(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    code = """
import json, pathlib, timm, torch, zoo, zoo.configs, zoo.kernels, zoo.layers
model = timm.create_model("biformer_nano", num_classes=3)
configs = [p.name for p in pathlib.Path(zoo.configs.__path__[0]).rglob("*_digits.py")]
files = [zoo.__file__, zoo.layers.__file__, zoo.kernels.__file__, *zoo.configs.__path__]
print(json.dumps([list(model(torch.randn(1, 3, 40, 30)).shape), configs, files]))
"""
    shape, configs, files = json.loads(python(code, cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}))
    assert shape == [1, 3] and "biformer_nano_digits.py" in configs
    assert all(file.startswith(str(target)) for file in files)
    command = [sys.executable, target / "bin/zoo", "models", "biformer_n?no", "--details"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(target)}).stdout
    assert "\nbiformer_nano  routing" in listed


def test_import_needs_only_torch_torchvision_and_timm():
    code = "import sys, torch, torchvision, timm; before = set(sys.modules); import zoo; print(*sorted(set(sys.modules) - before))"
    new = {name.split(".")[0] for name in python(code).split()} - set(sys.stdlib_module_names)
    allowed = {"zoo", "torch", "torchvision", "timm"}
    assert not {name for name in new if not name.startswith("__editable__")} - allowed
