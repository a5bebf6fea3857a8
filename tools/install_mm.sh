#!/usr/bin/env bash
# Installs mmcv, mmdetection and mmsegmentation beside zoo:  tools/install_mm.sh [PYTHON], by default `python`.
#
# mmcv's operators are compiled for the torch that is there and the wheel is kept, under ~/.cache/zoo/wheels. The toolboxes are
# installed without what they ask for: setup.cfg lists what they need, without a second OpenCV beside the headless one.
set -euo pipefail
python=$("${1:-python}" -c "import sys; print(sys.executable)")
cd "$(dirname "$0")/.."
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }

pip install --constraint constraints.txt --editable ".[mm]"
wheels=${XDG_CACHE_HOME:-${HOME:-}/.cache}/zoo/wheels/torch-$("$python" -c 'import torch; print(torch.__version__)')
mkdir -p "$wheels" 2>/dev/null && [ -w "$wheels" ] || wheels=$PWD/build/wheels
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
if compgen -G "$wheels/onedl_mmcv-2.3.6-$tag-*.whl" >/dev/null; then
    echo "Installing mmdetection and mmsegmentation, and mmcv from the wheel kept in $wheels: about a minute."
else
    echo "Installing mmdetection and mmsegmentation; mmcv is compiled for the CPU, once, its wheel kept in $wheels: about 6 minutes on two cores."
    compiler=$(mktemp)
    trap 'rm -f "$compiler"' EXIT
    # mmcv asks for C++17, torch's headers for C++20
    printf '#!/bin/sh\nfor flag; do shift; set -- "$@" "$(echo "$flag" | sed s/^-std=c++17$/-std=c++20/)"; done\nexec c++ "$@"\n' >"$compiler"
    chmod +x "$compiler"
    CXX=$compiler CFLAGS=-g0 PATH="$(dirname "$python"):$PATH" MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=$(nproc) \
        pip wheel --no-build-isolation --no-deps --wheel-dir "$wheels" onedl-mmcv==2.3.6
fi
pip install --no-deps --no-index --find-links "$wheels" onedl-mmcv==2.3.6
pip install --no-build-isolation --no-deps onedl-mmdetection==3.5.1 onedl-mmsegmentation==1.4.2 imaug==0.4.3
