"""Pictures of what was seen, as PNG files and one HTML page."""
import base64
import contextlib
import html
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from zoo.files import check_writable, explaining, make_folder


@dataclass(frozen=True)
class Seen:
    """A picture, the name of its file, and what it shows."""

    name: str
    title: str
    caption: str
    picture: Image.Image


def page(title: str, sections: Sequence[tuple[str, Sequence[Seen]]]) -> str:
    """One HTML document with all pictures inside: it needs no other file and no server."""
    parts = []
    for heading, seen in sections:
        parts.append(f"<section><h2>{html.escape(heading)}</h2>")
        for shown in seen:
            buffer = io.BytesIO()
            shown.picture.save(buffer, "PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append(f'<figure><h3>{html.escape(shown.title)}</h3><img alt="{html.escape(shown.title)}" '
                         f'src="data:image/png;base64,{data}"><figcaption>{html.escape(shown.caption)}</figcaption></figure>')
        parts.append("</section>")
    style = ("body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}"
             "section{display:flex;flex-wrap:wrap;gap:1.5rem}h2{width:100%}h3{font-size:1rem;margin:0}figure{margin:0;max-width:34rem}"
             "img{min-width:16rem;max-width:100%}figcaption{color:#555}")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
            f"<h1>{html.escape(title)}</h1>{''.join(parts)}</html>")


@contextlib.contextmanager
def folder_for_pictures(folder: str | Path) -> Iterator[None]:
    """Makes `folder` before the work whose pictures go there, and takes back what it made if the block ends with an error.

    Raises InputError if there can be no such folder, or nothing can be written to it.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]  # Path.exists raises for some names
    try:
        make_folder(folder)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def write(folder: str | Path, title: str, sections: Sequence[tuple[str, Sequence[Seen]]]) -> list[Path]:
    """Writes every picture as a PNG file and the page `index.html` into `folder`, which is made; returns the files.

    They are there all or, with an InputError, none: if the disk is full, or the folder cannot be written to.
    """
    folder = Path(folder)
    pictures = {f"{i + 1:03d}-{shown.name}.png": shown.picture for i, (_, seen) in enumerate(sections) for shown in seen}
    files = [folder / name for name in (*pictures, "index.html")]
    with folder_for_pictures(folder), explaining(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".pictures.") as made:
        for name, picture in pictures.items():
            picture.save(Path(made) / name)
        (Path(made) / "index.html").write_text(page(title, sections), encoding="utf-8")
        for path in files:
            check_writable(path)
        for path in files:
            (Path(made) / path.name).replace(path)
    return files
