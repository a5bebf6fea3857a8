"""Downloads the authors' weights of a model.

Says where they come from and under what licence first. Where the authors offer a page to click on instead of a file, prints the page
and how to use the file. Nothing is downloaded twice.
"""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse
import sys
from pathlib import Path

from zoo.errors import InputError
from zoo.tools._cli import Parser, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__file__, __doc__, "litv2_s", "biformer_small", "fan_tiny_12_p16_224 --accept-licence")
    parser.add_argument("model", help="a model's name, such as litv2_s; or 'all' to list those that have weights")
    parser.add_argument("--accept-licence", action="store_true",
                        help="download weights although their licence allows some uses only, or none is stated: read it first")
    parser.add_argument("--cache", type=Path, metavar="FOLDER",
                        help="where to keep the file (default: checkpoints/zoo in the cache of torch.hub; create_model(cache_dir=FOLDER) "
                             "finds it elsewhere)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)

    from zoo import downloads
    from zoo.models.released import Released, names, released

    if args.cache is not None and args.cache.is_file():
        raise InputError(f"nothing can be kept in {args.cache}: it is a file; choose a folder")

    def say(name: str, found: Released) -> None:
        kept = downloads.place(found.url, name, args.cache) if found.url else None
        state = "here" if kept is not None and kept.exists() else "to download" if found.url else "on a page"
        print(f"{name:<28}{found.licence or 'no licence stated':<24}{state}")

    if args.model == "all":
        for name in names():
            say(name, released(name))
        return 0
    found = released(args.model)
    print(f"{args.model}: {found.file or 'weights'} by its authors, from {found.url or found.page}")
    print(f"licence: {found.licence or 'none is stated'}")
    if found.url is None:
        print("The authors offer a page, not a file: open the address in a browser, and use the downloaded file so:\n"
              + _use(args.model, found.file or "DOWNLOADED_FILE"))
        return 0
    if not (downloads.is_free(found.licence) or args.accept_licence or downloads.place(found.url, args.model, args.cache).exists()):
        raise InputError(f"the licence of these weights ({found.licence or 'none is stated'}) does not allow every use; read it at "
                         f"{found.page}, and if it allows yours, add --accept-licence")
    path = downloads.fetch(found.url, args.model, licence=found.licence, accept_licence=args.accept_licence, cache_dir=args.cache,
                           progress=_Progress())
    print(f"it is at {path}\nuse it so:\n{_use(args.model, None if args.cache is None else str(path))}")
    return 0


def _use(name: str, file: str | None) -> str:
    overlay = f', pretrained_cfg_overlay=dict(file="{file}")' if file else ""
    return f'  timm.create_model("{name}", pretrained=True{overlay})'


class _Progress:
    """One line that counts, on a terminal; elsewhere a line for each tenth."""

    def __init__(self) -> None:
        self.tenth = -1

    def __call__(self, done: int, total: int | None) -> None:
        whole = f" of {total / 1e6:.1f}" if total else ""
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{done / 1e6:.1f}{whole} MB", end=end, file=sys.stderr, flush=True)
        elif total and (tenth := 10 * done // total) > self.tenth:
            self.tenth = tenth
            print(f"{done / 1e6:.1f}{whole} MB", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
