"""Writes what is counted into the model cards: whose weights there are, where, under what licence, and what of them the tests verify.

Each card is a page docs/cards/MECHANISM.md. What stands outside the marks is written by hand.
"""
import argparse
import json
from collections import Counter
from pathlib import Path

import timm

import zoo
from zoo.errors import InputError
from zoo.measuring.model_table import marks
from zoo.models.released import names, released
from zoo.tools._cli import run

ROOT = Path(__file__).resolve().parents[1]
CARDS, GOLDEN = ROOT / "docs" / "cards", ROOT / "tests" / "golden"
VECTORS = {  # by mechanism: the folders of tests/golden with numbers of its authors' code
    "a2n": ("a2n",), "atconv": ("atconv", "attnet"), "connectivity": ("connectivity",), "dual": ("dual_attention",),
    "gates": ("attention_gate", "attention_unet"), "hilo": ("hilo", "litv2"), "holistic": ("han",), "inspyrenet": ("inspyrenet",),
    "moh": ("moh",), "msinet": ("msinet",), "parts": ("ifam",), "polarized": ("polarized",), "removal": ("attention_removal",),
    "routing": ("bra", "biformer"), "sk": ("sk",), "ss2d": ("ss2d",),
    "sum": ("sum",), "tap": ("tap", "fan", "adl"),
}
TESTS = {"inspyrenet": "tests/models/test_inspyrenet.py", "msinet": "tests/models/test_msinet.py"}  # where it is not the one of most
MANIFESTS = {"msinet": "tests/models/test_msinet.py"}
OURS = {  # manifests of another name than our model's
    "unet_CT_multi_att_dsv_3D": "attention_unet3d", "dconnnet_resnet34_1": "dconnnet", "dconnnet_resnet34_4": "dconnnet",
    "vssm_tiny": "vmamba_tiny_v0", "vssm_small": "vmamba_small_v0"}


def card(mechanism: str) -> str:
    """The generated part of a card."""
    return f"{_weights(mechanism)}\n\n{_verified(mechanism)}"


def _family(name: str) -> str:
    return next(mechanism for mechanism, family in zoo.MECHANISMS.items() if family.__name__ == timm.model_entrypoint(name).__module__)


def _weights(mechanism: str) -> str:
    rows = [name for name in names() if _family(name) == mechanism]
    if not rows:
        return "No weights of these models were released by the authors for PyTorch, as far as is known."
    lines = ["| model | the authors' file | from | licence | evaluated | reported top-1 |", "| --- | --- | --- | --- | --- | ---: |"]
    for name in rows:
        found, top1 = released(name), zoo.REPORTED_TOP1.get(name)
        address = f"[download]({found.url})" if found.url else f"[page]({found.page})"
        lines.append(f"| `{name}` | {f'`{found.file}`' if found.file else 'not known'} | {address} | {found.licence or 'none stated'} | "
                     f"{f'`{found.key}`' if found.key else 'not known'} | {f'{top1} %' if top1 else '–'} |")
    return "\n".join(lines)


def _verified(mechanism: str) -> str:
    cases = [case for case in json.loads((GOLDEN / "index.json").read_text()) if case["family"] in VECTORS.get(mechanism, ())]
    manifests = sorted(name for path in (GOLDEN / "manifests").glob("*.json")
                       if (name := OURS.get(path.stem, path.stem)) in zoo.list_models() and _family(name) == mechanism)
    lines = ["| verified | how | by |", "| --- | --- | --- |"]
    if cases:
        counts = Counter(case["family"] for case in cases)
        sources = sorted({case["reference"].split(" ")[0] for case in cases})
        counted = ", ".join(f"{number} × {name}" for name, number in counts.items())
        lines.append(f"| outputs and all gradients as the authors' code gives them, {counted} "
                     f"| numbers of {' and '.join(sources)}, float32, 1e-5 and 1e-4 "
                     f"| `{TESTS.get(mechanism, 'tests/models/test_conformance.py')}` |")
    if manifests:
        named = ", ".join(f"`{name}`" for name in manifests)
        lines.append(f"| every name and shape of the weights of the authors' networks, and the count of parameters: {named} "
                     "| a file of these names with random numbers, loaded strictly and compared "
                     f"| `{MANIFESTS.get(mechanism, 'tests/models/test_manifests.py')}` |")
    lines.append("| which weights of a file are taken, wrappers' names, files that do not fit, files that mean harm "
                 "| files made for it | `tests/zoo/test_weights.py` |")
    return "\n".join(lines)


def write_cards(folder: Path) -> list[Path]:
    """Writes the generated part of every card in `folder`. Raises InputError for a card without a place for it."""
    begin, end = marks("card")
    written = []
    for mechanism in zoo.MECHANISMS:
        path = folder / f"{mechanism}.md"
        text = path.read_text()
        if begin not in text or end not in text:
            raise InputError(f"{path} has no place for what is generated; it is between the lines {begin} and {end}")
        path.write_text(f"{text.split(begin)[0]}{begin}\n{card(mechanism)}\n{end}{text.split(end)[1]}")
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards", description=__doc__, epilog="example: python -m benchmarks.cards")
    parser.add_argument("folder", nargs="?", type=Path, default=CARDS, help=f"default: {CARDS.relative_to(ROOT)}")
    for path in write_cards(parser.parse_args().folder):
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
