"""mmcv, mmdetection and mmsegmentation: which packages they come in, and how these are installed beside zoo.

mmcv's operators have to be compiled for the torch that is there. The toolboxes are installed without what they ask for: zoo's extra
`mm` lists what they need, without a second OpenCV beside the headless one. pysodmetrics comes the same way: it
asks for an older NumPy than is there, and needs none.
"""
import importlib.metadata
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from zoo.errors import InputError

TOOLBOXES = {"mmcv": "mmcv", "mmdet": "mmdetection", "mmseg": "mmsegmentation"}  # by the name that is imported
PROJECT = "zoo-attention"
MMCV = "onedl-mmcv==2.3.6"
ON_TOP = ("onedl-mmdetection==3.5.1", "onedl-mmsegmentation==1.4.2", "imaug==0.4.3", "pysodmetrics==1.6.2")
AS_THEY_ARE = ("--no-build-isolation", "--no-deps")
PIP = f"pip install {' '.join(AS_THEY_ARE)}"
INSTALL = (f"install it with: zoo install-mm (which is: pip install '{PROJECT}[mm]'; MMCV_WITH_OPS=1 {PIP} {MMCV}; "
           f"{PIP} {' '.join(ON_TOP)})")
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"  # of a checkout
# mmcv asks for C++17, torch's headers for C++20
COMPILER = """#!/bin/sh
for flag; do shift; set -- "$@" "$(echo "$flag" | sed s/^-std=c++17$/-std=c++20/)"; done
exec c++ "$@"
"""


def install(progress: Callable[[str], None] = lambda step: None) -> None:
    """Installs the toolboxes into the environment of this process. mmcv's wheel is compiled for the CPU and kept in the user's cache.

    Raises InputError if zoo is not installed there, or pip fails.
    """
    try:
        version = importlib.metadata.version(PROJECT)
    except importlib.metadata.PackageNotFoundError:  # an index may have another project of that name
        raise InputError(f"{PROJECT} is not installed in the environment of {sys.executable}; install it there first") from None
    constraints = ["--constraint", CONSTRAINTS] if CONSTRAINTS.is_file() else []
    _pip("install", *constraints, f"{PROJECT}[mm]=={version}")
    folder = wheel_folder()
    if list(folder.glob(f"{MMCV.replace('-', '_').replace('==', '-')}-{_tag()}-*.whl")):
        progress(f"Installing mmdetection and mmsegmentation, and mmcv from the wheel kept in {folder}: about a minute.")
    else:
        progress(f"Installing mmdetection and mmsegmentation; mmcv is compiled for the CPU, once, its wheel kept in {folder}: "
                 "about 6 minutes on two cores.")
        _compile(folder)
    _pip("install", "--no-deps", "--no-index", "--find-links", folder, MMCV)
    _pip("install", *AS_THEY_ARE, *ON_TOP)


def wheel_folder() -> Path:
    """Where wheels for the installed torch are kept."""
    import torch

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo" / "wheels"
    folder = cache / f"torch-{torch.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"mmcv's wheel cannot be kept in {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written "
                         "to") from error
    return folder


def _tag() -> str:
    return f"cp{sys.version_info.major}{sys.version_info.minor}"


def _compile(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        compiler = Path(temporary) / "c++"
        compiler.write_text(COMPILER)
        compiler.chmod(0o700)
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja is beside python
        _pip("wheel", *AS_THEY_ARE, "--wheel-dir", folder, MMCV, CXX=str(compiler), CFLAGS="-g0", PATH=tools, MMCV_WITH_OPS="1",
             FORCE_CUDA="0", MAX_JOBS=str(len(os.sched_getaffinity(0))))


def _pip(*arguments: object, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    if subprocess.run(command, env=os.environ | environment, check=False).returncode:
        raise InputError(f"this did not work, for the reason above: {shlex.join(command)}")
