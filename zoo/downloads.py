"""The authors' weights (`zoo.models.released`) from their addresses: whole, checked, under names that cannot clash, their licence first."""
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from zoo.errors import InputError
from zoo.files import explaining, make_folder, replacing

FREE = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit")  # licences that nobody has to be asked about
ATTEMPTS = 5  # connections that may break before a download is given up
WAIT = 30.0  # seconds without a byte after which one counts as broken
PIECE = 1 << 20
LOG = logging.getLogger("zoo")


def is_free(licence: str | None) -> bool:
    """Whether weights under `licence`, by its SPDX name, may be used for anything; not so where none is stated."""
    return (licence or "").lower() in FREE


def place(url: str, name: str, cache_dir: str | Path | None = None) -> Path:
    """Where the weights of the model `name` from `url` are kept: in `cache_dir`, by default the folder `checkpoints/zoo` of torch's hub.

    The address is part of the name, so that files which are called the same elsewhere are told apart.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints" / "zoo"
    suffix = "".join(Path(urllib.parse.urlsplit(url).path).suffixes[-2:]) or ".pth"
    return folder / f"{name}.{hashlib.sha256(url.encode()).hexdigest()[:12]}{suffix}"


def fetch(url: str, name: str, *, licence: str | None = None, accept_licence: bool = False, cache_dir: str | Path | None = None,
          size: int | None = None, sha256: str | None = None, progress: Callable[[int, int | None], None] | None = None) -> Path:
    """The file at `url` in the cache, downloaded unless it is there.

    A broken connection is taken up where it broke, if the server says that the file is the same, or from the start. The file appears
    under its name when it is complete, and nothing is left of one that is not.

    Args:
        url: an address of http or https; one that begins with https is not followed to another kind.
        name: the model that the weights are of.
        licence: the weights', by its SPDX name. Unless it is free, the first download has to say `accept_licence`.
        size: bytes, where known beforehand; otherwise what the server announces is checked.
        sha256: of the file, where known.
        progress: called with the bytes that are there and all that there are, or None.

    Raises InputError for a licence not accepted, an address that cannot be reached, and a file of another size or hash.
    """
    path = place(url, name, cache_dir)
    if path.exists():
        return path
    if not (is_free(licence) or accept_licence):
        raise InputError(f"the weights of {name} are not free: their licence is {licence or 'not stated'}. "
                         f"Read it; if it allows your use: zoo fetch {name} --accept-licence")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"{url} is no address of http or https")
    make_folder(path.parent)
    LOG.info("downloading the weights of %s, licence %s, from %s to %s", name, licence or "not stated", url, path)
    with replacing(path) as unfinished, explaining(path), unfinished.open("wb") as file:
        _download(url, file, size, progress)
        _check(url, unfinished, file, sha256)
    return path


def _download(url: str, file: BinaryIO, size: int | None, progress: Callable[[int, int | None], None] | None) -> None:
    validator, trouble = None, ""
    for _ in range(ATTEMPTS):
        done = file.tell()
        headers = {"User-Agent": "zoo-attention"}
        if done and validator:
            headers |= {"Range": f"bytes={done}-", "If-Range": validator}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=WAIT) as answer:
                if url.startswith("https:") and not answer.url.startswith("https:"):
                    raise InputError(f"{url} leads to {answer.url}, which is not encrypted")
                if answer.status != 206:  # the whole file
                    file.seek(0)
                    file.truncate()
                validator = _validator(answer)
                announced = answer.headers.get("Content-Length")
                total = file.tell() + int(announced) if announced else None
                if size is not None and total not in (None, size):
                    raise InputError(f"{url} is a file of {total} bytes, where {size} are expected")
                total = size if total is None else total
                while piece := answer.read(PIECE):
                    file.write(piece)
                    if total is not None and file.tell() > total:
                        raise InputError(f"{url} gave more than the {total} bytes that it should")
                    if progress:
                        progress(file.tell(), total)
                if total is None or file.tell() == total:
                    return
                trouble = f"the connection ended after {file.tell()} of {total} bytes"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise InputError(f"{url} cannot be downloaded: the server answers {error.code} {error.reason}") from None
            trouble = f"the server answers {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            trouble = str(getattr(error, "reason", error)) or type(error).__name__
    raise InputError(f"{url} cannot be downloaded, tried {ATTEMPTS} times: {trouble}")


def _validator(answer: http.client.HTTPResponse) -> str | None:
    """What tells this version of the file from others; weak tags, which do not, begin with W/."""
    tag = answer.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")


def _check(url: str, path: Path, file: BinaryIO, sha256: str | None) -> None:
    file.flush()
    os.fsync(file.fileno())
    with path.open("rb") as written:
        found = hashlib.file_digest(written, "sha256").hexdigest()
        written.seek(0)
        start = written.read(64)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{url} gave a page, not a file; open it in a browser")
    if sha256 and found != sha256.lower():
        raise InputError(f"{url} gave a file with SHA-256 {found}, where {sha256} is expected")
