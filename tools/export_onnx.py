"""Exports a model to ONNX, runs the file in ONNX Runtime at several sizes and compares it with PyTorch."""
import argparse
import sys
from pathlib import Path

from torch import nn

from zoo.checkpoints import CHECKPOINT_SUFFIXES, TOOLBOXES, ModelInfo, load_model, recorded_task
from zoo.cli import run
from zoo.export import AXES, Exported, ExportError, export_onnx


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/export_onnx.py work_dirs/digits/latest.pth -o digits.onnx\n"
               "  python tools/export_onnx.py biformer_tiny -o tiny.onnx --size 384 384 --static-size --batch 1\n"
               "  python tools/export_onnx.py work_dirs/scenes/iter_1500.pth -o upernet.onnx")
    parser.add_argument("model", help="a checkpoint that tools/train.py wrote, also of mmsegmentation's models and RetinaNet, "
                                      "or a registered model's name (random weights)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument("--size", type=int, nargs="+", metavar="N",
                        help="size to trace: height and width, of volumes depth, height and width (default: the model's own)")
    parser.add_argument("--static-size", action="store_true", help="accept images of that size only")
    parser.add_argument("--batch", type=int, help="accept batches of this size only (default: any)")
    parser.add_argument("--opset", type=int, default=20, help="ONNX operator set, 18 or newer (default: 20)")
    parser.add_argument("--spell-out", action="store_true", help="deformable convolutions in operators of opset 16, not as DeformConv")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    model, info = load(args.model)
    try:
        exported = export_onnx(model, info, args.output, size=args.size, free_size=not args.static_size, batch=args.batch,
                               opset=args.opset, spell_out=args.spell_out,
                              progress=lambda step: print(f"{step} …", file=sys.stderr, flush=True))
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(info.name, exported)
    return 0


def load(name_or_path: str) -> tuple[nn.Module, ModelInfo]:
    """As `load_model`; also segmentors of mmsegmentation and RetinaNet."""
    if name_or_path.endswith(CHECKPOINT_SUFFIXES) and recorded_task(name_or_path) in TOOLBOXES:
        from zoo.mm.deploy import load_deployable

        return load_deployable(name_or_path)
    return load_model(name_or_path)


def report(name: str, exported: Exported) -> None:
    axes = AXES[len(exported.comparisons[0].size)]
    print(f"batch  {' x '.join(axes)}  largest absolute difference to PyTorch")
    for row in exported.comparisons:
        print(f"{row.batch:5d}  {' x '.join(f'{n:6d}' for n in row.size)}  {row.difference:.2e}")
    print(f"worst: {exported.worst:.2e}")
    sizes = "any" if exported.free_size else f"fixed ({exported.reason})"
    print(f"batch size: {'any' if exported.free_batch else 'fixed'}; {' and '.join(axes)}: {sizes}")
    print(f"wrote {name} to {exported.path} ({exported.path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main)
