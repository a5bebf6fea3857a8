"""Installs mmcv, mmdetection and mmsegmentation beside zoo, for detection and segmentation."""
if __name__ == "__main__":
    import _checkout  # noqa: F401  so that the checkout's own zoo is used

import argparse

from zoo.tools._cli import Parser, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    return Parser(__file__, f"{__doc__} mmcv is compiled, with the C++ compiler of the system.", "").parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    parse(arguments)

    from zoo.toolboxes import TOOLBOXES, install

    install(progress=lambda step: print(step, flush=True))
    print(f"installed {', '.join(TOOLBOXES.values())}")


if __name__ == "__main__":
    run(main)
