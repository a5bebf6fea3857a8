"""Heads on a frozen network for classes that it has never seen, and efficient probing beside its formula; writes probing.md beside it,
and docs/queries.png.

The network learns the digits 0 to 4 by `zoo train`; `zoo probe` then trains heads on its tokens of the digits 5 to 9.

    python -m benchmarks.probing 0 1 2     # seeds; about two minutes each on two quiet cores
    python -m benchmarks.probing layer     # the pooling alone
"""
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.checkpoints import load_trained
from zoo.layers import EfficientProbing, SimPool
from zoo.measuring.model_benchmark import cpu_name
from zoo.reading.digits import Digits
from zoo.reading.pictures import open_picture
from zoo.seeing.classifiers import mechanisms

MODEL, SIDE, QUERIES = "deit_nano_patch16_224_cb", 64, 16
TABLE = Path(__file__).with_suffix(".md")
PICTURE = Path(__file__).parents[1] / "docs" / "queries.png"
DATA = "<!-- measured: "
HEADS = ("linear", "class", "simpool", "attentive")
BATCH, TOKENS, WIDTH, CHUNKS, ROUNDS = 64, 196, 768, 32, 9


def write_digits(root: Path, labels: range) -> None:
    for split in ("train", "val"):
        digits = Digits(split)
        for i in range(len(digits)):
            picture, label = digits.read(i)
            if label in labels:
                folder = root / split / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{i:04d}.png")


def zoo(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "zoo", *map(str, arguments)], check=True)


def probed(model: object, pictures: Path, work_dir: Path, *arguments: object) -> dict[str, dict[str, float]]:
    zoo("probe", model, pictures, "--work-dir", work_dir, "--queries", QUERIES, *arguments)
    with (work_dir / "heads.csv").open() as file:
        return {row.pop("head"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}


def measure(seed: int) -> dict:
    """By weights "trained" and "random", by head: parameters, accuracy, seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder / "old", range(5))
        write_digits(folder / "new", range(5, 10))
        zoo("train", MODEL, folder / "old", "--size", SIDE, "--epochs", 20, "--seed", seed, "--work-dir", folder / "run")
        best = max((folder / "run").glob("*.pth"), key=lambda path: (path.name.startswith("best"), path.stat().st_mtime))
        found = {"trained": probed(best, folder / "new", folder / "heads", "--seed", seed),
                 "random": probed(MODEL, folder / "new", folder / "random", "--seed", seed, "--size", SIDE)}
        if seed == 0:
            picture(folder / "heads" / "attentive.pth", folder / "new" / "val" / "7")
        return found


def picture(checkpoint: Path, digits: Path) -> None:
    """Where the queries look on the first of the digits, for the guide."""
    model, info = load_trained(checkpoint)
    seen = mechanisms(model, info, open_picture(min(digits.iterdir()), info.input_size[0]))
    shown, = (each.picture for each in seen if "EfficientProbing" in each.title)
    shown.resize((800, 800 * shown.height // shown.width)).quantize(96).save(PICTURE, optimize=True)


class Plain(nn.Module):
    """Efficient probing as its formula is written: values of all tokens, then their weighted sums."""

    def __init__(self, layer: EfficientProbing):
        super().__init__()
        self.queries, self.v, self.count = layer.cls_token, layer.v, layer.num_queries

    def forward(self, x: Tensor) -> Tensor:
        attention = (self.queries @ x.mT * x.shape[-1] ** -0.5).softmax(-1)[:, :, None]
        values = self.v(x).unflatten(-1, (self.count, -1)).transpose(1, 2)
        return (attention @ values).flatten(1)


def layer_times() -> dict[str, list[float]]:
    """Milliseconds forward, and forward and backward: medians of rounds in which all take turns."""
    torch.manual_seed(0)
    ours, x = EfficientProbing(WIDTH, CHUNKS), torch.randn(BATCH, TOKENS, WIDTH)
    layers = {"efficient probing": ours, "its formula": Plain(ours), "SimPool": SimPool(WIDTH)}
    torch.testing.assert_close(ours(x), layers["its formula"](x), rtol=1e-4, atol=1e-4)
    found: dict[str, list[list[float]]] = {name: [[], []] for name in layers}
    for _ in range(ROUNDS):
        for name, layer in layers.items():
            with torch.inference_mode():
                found[name][0].append(timed(lambda layer=layer: layer(x)))
            found[name][1].append(timed(lambda layer=layer: layer(x).sum().backward()))
    return {name: [round(statistics.median(times[1:]), 1) for times in both] for name, both in found.items()}


def timed(run) -> float:
    started = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - started)


def heads_table(seeds: list[dict]) -> list[str]:
    lines = [
        f"`{MODEL}` at {SIDE} pixels learned the digits 0 to 4 and was frozen; `zoo probe` trained heads on its tokens of the digits 5 to "
        f"9, which it had never seen, {QUERIES} queries in the attentive one. Accuracy on held-out digits after the last epoch, in per "
        f"cent, of {len(seeds)} seed{'s' if len(seeds) > 1 else ''} of network and heads; seconds of training a head, tokens being "
        "there.", "",
        "| head | parameters | network trained on other digits | mean | network of random weights | mean | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |"]
    for head in HEADS:
        cells = [head, f"{seeds[0]['trained'][head]['parameters']:,.0f}"]
        for weights in ("trained", "random"):
            values = [seed[weights][head]["accuracy"] for seed in seeds]
            cells += [", ".join(f"{value:.2f}" for value in values), f"{statistics.mean(values):.2f}"]
        cells.append(f"{statistics.median(seed['trained'][head]['seconds'] for seed in seeds):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def layer_table(times: dict[str, list[float]]) -> list[str]:
    return [f"The poolings alone, {BATCH} pictures of {TOKENS} tokens {WIDTH} wide, {CHUNKS} queries, medians of {ROUNDS - 1} rounds in "
            "turns. Ours pools before the values are made, which gives the same numbers.", "",
            "| | forward, ms | forward and backward, ms |", "| --- | --- | --- |",
            *(f"| {name} | {forward} | {both} |" for name, (forward, both) in times.items())]


def write(measured: dict) -> None:
    seeds = [measured[seed] for seed in sorted(measured) if seed != "layer"]
    lines = ["# Heads on a frozen network", "",
             f"On {cpu_name()}, torch {torch.__version__}, CPython {platform.python_version()}, one thread, beside other work. "
             "`python -m benchmarks.probing` measures it again.", "", *(heads_table(seeds) if seeds else ()), "",
             *(layer_table(measured["layer"]) if "layer" in measured else ()), "", f"{DATA}{json.dumps(measured)} -->", ""]
    TABLE.write_text("\n".join(lines))


def main() -> None:
    for what in sys.argv[1:] or ("0", "1", "2", "layer"):
        new = layer_times() if what == "layer" else measure(int(what))
        text = TABLE.read_text() if TABLE.exists() else ""
        write({**(json.loads(text.split(DATA)[1].split(" -->")[0]) if DATA in text else {}), what: new})


if __name__ == "__main__":
    main()
