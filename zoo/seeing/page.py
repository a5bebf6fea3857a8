"""Pictures of what was seen, as PNG files and one HTML page."""
import base64
import contextlib
import html
import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from zoo.files import check_writable, explaining, make_folder


@dataclass(frozen=True)
class Seen:
    """A picture, the name of its file, what it shows, and which colours of `LEGEND` are in it."""

    name: str
    title: str
    caption: str
    picture: Image.Image
    colours: tuple[str, ...] = ()


# What colours mean: how they look, as CSS has it, and a sentence.
LEGEND = {
    "heat": ("linear-gradient(90deg,#000004,#57106e,#bc3754,#f98e09,#fcffa4)", "over the picture: dark is little, bright much"),
    "gates": ("linear-gradient(90deg,#000,#f00,#ff0,#fff)", "over the image: from what a gate lets through least to most"),
    "from": ("#f00", "the place, or the region, that is asked from"),
    "routes": ("linear-gradient(90deg,#ffc,#fd0)", "what it attends to: the stronger the colour, the more"),
    "block": ("#fff", "the block that it lies in"),
    "samples": ("linear-gradient(90deg,#1f77b4,#ff7f0e,#2ca02c)", "dots: where the convolution samples for the cross nearby"),
    "relations": ("linear-gradient(90deg,#b2182b,#f7f7f7,#2166ac)", "over the picture: red above 0, blue below"),
    "parts": ("linear-gradient(90deg,#1f77b4,#ff7f0e,#2ca02c,#d62728,#9467bd,#8c564b,#e377c2,#bcbd22)", "over the picture: a part each"),
    "masked": ("#000", "over the picture: what is not seen any more"),
    "signs": ("linear-gradient(90deg,#b2182b,#f7f7f7,#2166ac)", "weights of kernels: red above 0, blue below"),
}


STYLE = """
:root{color-scheme:light dark;--text:#1d2125;--soft:#59616a;--line:#d5dae0;--ground:#fff;--card:#f4f6f8;--accent:42 110 190}
@media(prefers-color-scheme:dark){:root{--text:#e4e7ea;--soft:#a2abb4;--line:#3a4148;--ground:#15181b;--card:#1e2327;--accent:98 160 234}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:76rem;padding:0 1rem;color:var(--text);background:var(--ground)}
h1{font-size:1.6rem;line-height:1.2;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:2rem 0 .5rem;width:100%;overflow-wrap:anywhere}
h3{font-size:1rem;margin:0;overflow-wrap:anywhere}
section.pictures{display:flex;flex-wrap:wrap;gap:1.5rem}section.pictures>figure{max-width:34rem}section.pictures img{min-width:16rem}
figure{margin:0}img{max-width:100%;height:auto}figcaption{color:var(--soft);overflow-wrap:anywhere}
"""


LEGEND_STYLE = """
.remark{border-left:.25rem solid rgb(var(--accent));background:var(--card);padding:.6rem .9rem}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;color:var(--soft);font-size:.9rem}
.legend li{display:flex;align-items:center;gap:.5rem}.legend span{flex:none;width:3rem;height:.9rem;border:1px solid var(--line)}
"""


def document(title: str, body: str, style: str = "") -> str:
    """One HTML document that needs no other file and no server, for small and large screens, light and dark. `body` is HTML."""
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>"
            f"<body><h1>{html.escape(title)}</h1>{body}</body></html>")


def image(picture: Image.Image, alt: str, kind: str = "PNG") -> str:
    """The element that shows a picture, which is inside it, as PNG or JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 85, "subsampling": 0} if kind == "JPEG" else {}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<img alt="{html.escape(alt)}" width="{picture.width}" height="{picture.height}" '
            f'src="data:image/{kind.lower()};base64,{data}">')


def page(title: str, sections: Sequence[tuple[str, Sequence[Seen]]], remark: str = "") -> str:
    """One HTML document with all pictures inside: it needs no other file and no server. `remark` stands above them."""
    used = {colour for _, seen in sections for shown in seen for colour in shown.colours}
    parts = ['<p class="remark">' + re.sub("`(.*?)`", r"<code>\1</code>", html.escape(remark)) + "</p>"] if remark else []
    if used:
        items = (f'<li><span style="background:{look}"></span>{html.escape(meaning)}</li>'
                 for colour, (look, meaning) in LEGEND.items() if colour in used)
        parts.append(f'<ul class="legend" aria-label="What the colours mean">{"".join(items)}</ul>')
    for heading, seen in sections:
        parts.append(f'<section class="pictures"><h2>{html.escape(heading)}</h2>')
        parts += [f"<figure><h3>{html.escape(shown.title)}</h3>"
                  f"{image(shown.picture, f'{Path(heading).name}, {shown.title}: {shown.caption}')}"
                  f"<figcaption>{html.escape(shown.caption)}</figcaption></figure>" for shown in seen]
        parts.append("</section>")
    return document(title, "".join(parts), LEGEND_STYLE)


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


def write(folder: str | Path, title: str, sections: Sequence[tuple[str, Sequence[Seen]]], remark: str = "") -> list[Path]:
    """Writes every picture as a PNG file and the page `index.html`, see `page`, into `folder`, which is made; returns the files.

    They are there all or, with an InputError, none: if the disk is full, or the folder cannot be written to.
    """
    folder = Path(folder)
    pictures = {f"{i + 1:03d}-{shown.name}.png": shown.picture for i, (_, seen) in enumerate(sections) for shown in seen}
    files = [folder / name for name in (*pictures, "index.html")]
    with folder_for_pictures(folder), explaining(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".pictures.") as made:
        for name, picture in pictures.items():
            picture.save(Path(made) / name)
        (Path(made) / "index.html").write_text(page(title, sections, remark), encoding="utf-8")
        for path in files:
            check_writable(path)
        for path in files:
            (Path(made) / path.name).replace(path)
    return files
