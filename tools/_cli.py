"""What every program does around its work, and the command `zoo`, which is all of them."""
import argparse
import ast
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zoo
from zoo import _command
from zoo.errors import InputError, near_misses

FOLDER = Path(__file__).parent
EXAMPLES = ("train biformer_nano_digits --work-dir work_dirs/digits", "predict work_dirs/digits/epoch_20.pth pictures/ -o sheet.png",
            "models '*_tiny' --details")


def run(main: Callable[..., int | None], *arguments: Any) -> None:
    """Runs a program's `main` and ends the process: an `InputError` becomes one line on stderr and exit status 2."""
    try:
        status = main(*arguments)
        sys.stdout.flush()
        sys.exit(status)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


class Parser(argparse.ArgumentParser):
    """Reads the arguments of the program in `file`, which its help describes by `description` and the commands `examples`.

    What `zoo` puts off importing until arguments are read is there afterwards.
    """

    def __init__(self, file: str, description: str, *examples: str):
        prog = f"zoo {program_name(Path(file))}"
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         epilog=_examples(f"{prog} {example}".rstrip() for example in examples))

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        parsed = super().parse_args(*args, **kwargs)
        finish_import()
        return parsed


class Progress:
    """Prints to the error output, a line every two seconds at most."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self.last > 2:
            print(line, file=sys.stderr, flush=True)
            self.last = time.monotonic()


def finish_import() -> None:
    """Imports into `zoo` what it left out while this process read its arguments."""
    if _command.import_is_put_off:
        _command.import_is_put_off = False
        importlib.reload(zoo)


def program_name(file: Path) -> str:
    return file.stem.replace("_", "-")


def programs() -> dict[str, str]:
    """The first sentence about every program, by its name. None of them is imported for it."""
    files = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
    texts = {program_name(path): ast.get_docstring(ast.parse(path.read_text())) or "" for path in files}
    return {name: " ".join(re.split(r"(?<=\.)\s", text, maxsplit=1)[0].split()) for name, text in texts.items()}


def command(arguments: Sequence[str] | None = None) -> None:
    """`zoo PROGRAM …` with the arguments of the command line; ends the process. Imports that program only."""
    run(_dispatch, sys.argv[1:] if arguments is None else list(arguments))


def _dispatch(arguments: list[str]) -> int | None:
    known = programs()
    match arguments:
        case [] | ["-h" | "--help", *_]:
            width = max(map(len, known))
            print("usage: zoo PROGRAM [ARGUMENT ...]\n\n"
                  "Attention mechanisms of the vision literature: train, test, export and look at them.\n\nprograms:")
            print(*(f"  {name:<{width}}  {text}" for name, text in known.items()), sep="\n")
            print(f"\n{_examples(f'zoo {example}' for example in EXAMPLES)}\n\n`zoo PROGRAM --help` says more of each.")
            return 0
        case ["--version", *_]:
            print(f"zoo {zoo.__version__}")
            return 0
    name, *rest = arguments
    if name not in known:
        raise InputError(f"there is no program {name!r}{near_misses(name, known) or '; programs are ' + ', '.join(known)}")
    return importlib.import_module(f"zoo.tools.{name.replace('-', '_')}").main(rest)


def _examples(commands) -> str:
    commands = list(commands)
    return f"example{'s' if len(commands) > 1 else ''}:\n" + "\n".join(f"  {command}" for command in commands)
