"""The command `zoo` reads its arguments, and prints its help, before it waits seconds for torch and timm.

In its process `import zoo` imports nothing else at first; `zoo.tools._cli.finish_import` makes up for it.
"""
import sys
from pathlib import Path


def _is_the_command() -> bool:
    """Whether this process was started as `zoo …`, `python -m zoo …` or `python tools/NAME.py …`."""
    script = sys.argv[0] if sys.argv else ""
    if script not in sys.orig_argv[1:]:  # in a process that multiprocessing started it is the parent's
        return False
    if script == "-m":  # so while the module to run is looked for
        return sys.orig_argv[sys.orig_argv.index("-m"):][1:2] == ["zoo"]
    path = Path(script)
    if path.name == "zoo" and path.is_file():  # pip's script, or somebody's of that name
        return b"from zoo.__main__ import main" in path.read_bytes()
    return path.suffix == ".py" and path.resolve().parent == (Path(__file__).parent / "tools").resolve()


import_is_put_off = _is_the_command()
