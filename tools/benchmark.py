"""Measures models, each side by side with a rival: forward, forward plus backward, and peak memory. Prints Markdown."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import json
import sys
from pathlib import Path

from zoo.files import check_writable, replacing
from zoo.measuring import DTYPES
from zoo.tools._cli import Parser, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "biformer_tiny resnet50 --batch 4 --size 224 224",
                    "biformer_tiny --against my_models:build --forward-only  # build(\"biformer_tiny\") in my_models.py gives the rival")
    parser.add_argument("models", nargs="+", metavar="model", help="a registered model's name or a checkpoint")
    parser.add_argument("--against", metavar="MODULE:CALLABLE",
                        help="called with a model's name, returns its rival, a torch.nn.Module (default: no rival)")
    parser.add_argument("--batch", type=int, default=4, help="images at once (default: 4)")
    parser.add_argument("--size", type=int, nargs="+", metavar="N",
                        help="size of the images: height and width, of volumes depth, height and width (default: each model's own)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images (default: float32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="times each is measured (default: 15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="both under torch.compile")
    parser.add_argument("--forward-only", action="store_true", help="no backward passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's time there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)

    from zoo.measuring.model_benchmark import FORWARD, PASSES, benchmark, load_callable

    if args.json is not None:
        check_writable(args.json)
    against = None if args.against is None else load_callable(args.against)
    report = benchmark(args.models, against, batch=args.batch, size=args.size, dtype=args.dtype, threads=args.threads,
                       rounds=args.rounds, device=args.device, compiled=args.compile, passes=(FORWARD,) if args.forward_only else PASSES,
                       progress=lambda step: print(f"{step} …", file=sys.stderr, flush=True))
    print(report.markdown())
    if args.json is not None:
        with replacing(args.json) as written:
            written.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        print(f"\nwrote {args.json}")
    return 0


if __name__ == "__main__":
    run(main)
