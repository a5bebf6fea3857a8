"""Makes one page of an ONNX file of `zoo export`, which names the classes of a dropped picture or cuts out what is not background.

    npm ci --prefix examples/browser
    python examples/browser/build.py digits.onnx -o digits.html

The page holds the network and ONNX Runtime for browsers: it opens from a disk as from any server, and needs nothing else.
"""
import argparse
import base64
import html
import json
import sys
from pathlib import Path

from zoo.errors import InputError
from zoo.predicting.exported import ExportedNetwork, exported_info

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web" / "dist"


def build(model: Path) -> str:
    """The page's text. Raises InputError for networks whose pictures it cannot prepare, and without the runtime."""
    network = ExportedNetwork(model)
    if network.of_toolbox:
        raise InputError(f"{model} is of a toolbox, whose steps the page does not do; classifiers and U-Nets can be put into it")
    info, said = exported_info(network), network.said
    if len(info.input_size) != 3:
        raise InputError(f"{model} is for volumes, and browsers have pictures")
    if info.task == "classification":
        if said["interpolation"] not in ("bilinear", "bicubic"):
            raise InputError(f"{model} resizes pictures by {said['interpolation']}, and the page does by bilinear and bicubic")
        if said["crop_mode"] != "center" or info.input_size[1] != info.input_size[2]:
            raise InputError(f"{model} crops {said['crop_mode']} to {info.input_size[1]}×{info.input_size[2]}; the page cuts out a square "
                             "at the centre")
    if not RUNTIME.is_dir():
        raise InputError(f"there is no {RUNTIME}; set it up with: npm ci --prefix {HERE}")
    parts = {
        "title": html.escape(f"{info.name}: {info.task}"),
        "said": json.dumps(said, ensure_ascii=False).replace("<", "\\u003c"),
        "model": _encoded(model),
        "wasm": _encoded(RUNTIME / "ort-wasm-simd-threaded.wasm"),
        "runtime": (RUNTIME / "ort.wasm.bundle.min.mjs").read_text(encoding="utf-8"),
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    return page


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a classifier or a U-Net for pictures, as `zoo export` writes it")
    parser.add_argument("-o", "--output", type=Path, default=Path("page.html"))
    args = parser.parse_args()
    try:
        args.output.write_text(build(args.model), encoding="utf-8")
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.output}, {args.output.stat().st_size / 1e6:.0f} MB")
