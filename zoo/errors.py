"""What a user gets to read when what they gave cannot be used."""
import difflib
import importlib
import textwrap
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence that says what came and what to do.

    Tools print it and exit with status 2 (`zoo.tools._cli.run`); libraries can catch it as a `ValueError`.
    """


class MissingPackageError(InputError, ImportError):
    """A package that an extra of the project brings is not installed."""


def near_misses(name: str, known: Iterable[str]) -> str:
    """A clause naming the entries of `known` that `name` may have been meant to be, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def first_few(names: Iterable[object], most: int = 4) -> str:
    """Names as sentences have them: the first `most`, and how many more there are."""
    listed = list(map(str, names))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def said_by(error: BaseException) -> str:
    """What another's error says in one line: its first, with the next where that only announces it; of one that says nothing its kind."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    last = next((i for i, line in enumerate(lines) if not line.rstrip().endswith(":")), len(lines) - 1)
    return textwrap.shorten(" ".join(lines[:last + 1]), 300, placeholder=" …")


def times(sizes: Iterable[int]) -> str:
    """Sizes as sentences have them: 3×4×5."""
    return "×".join(map(str, sizes))


def require(what: str, extra: str, *packages: str) -> None:
    """Raises MissingPackageError, saying how to install it, for the first of `packages` that `what` needs and that is not there."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f"{what} needs the package {package}; install it with: pip install 'zoo-attention[{extra}]'") from error
