"""Files that are there whole or not at all."""
import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from zoo.errors import InputError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
IMPOSSIBLE = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # names


@contextlib.contextmanager
def explaining(path: str | Path, errors: tuple[int, ...] = UNWRITABLE) -> Iterator[None]:
    """Turns what the system says of a full or protected disk, while `path` is written inside, into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in errors:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, on the disk of `path`, that takes the place of `path` if the block ends without an error.

    Raises InputError if there can be no file at `path`, or the disk is full.
    """
    path = Path(path)
    check_writable(path)
    with explaining(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        yield written
        written.replace(path)


def check_writable(path: str | Path) -> None:
    """Raises InputError if there can be no file at `path`: to be called before the work whose result goes there."""
    path = Path(path)
    with explaining(path, UNWRITABLE + IMPOSSIBLE):
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}")


def make_folder(path: str | Path) -> None:
    """Makes a folder, and those above it, unless it is there. Raises InputError where it cannot be made or written to."""
    for place in (path, *Path(path).parents):
        if os.path.isfile(place):
            raise InputError(f"cannot write to the folder {path}: {place} is a file; choose another folder")
    with explaining(path, UNWRITABLE + IMPOSSIBLE):
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
