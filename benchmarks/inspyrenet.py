"""InSPyReNet beside transparent-background, the package that its users install: writes inspyrenet.md beside it.

    pip install --no-deps --target FOLDER transparent-background kornia kornia-rs
    python -m benchmarks.inspyrenet FOLDER

Its network only, which is under the MIT licence; the package's own imports want more packages and a window system.
"""
import importlib.metadata
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn

import zoo
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts
from zoo.models.inspyrenet import blend, scaled

PAGE = Path(__file__).with_suffix(".md")
BASE, LARGE, ROUNDS = 384, (544, 576), 3
HEAD = """# InSPyReNet beside transparent-background

`python -m benchmarks.inspyrenet FOLDER`: `inspyrenet_swin_b` and the network of transparent-background {version}, with the same random
weights, one picture. Alpha is from 0 to 1; the largest difference is {once:.1e} where the picture is seen once, at {base}×{base}, and
{twice:.1e} where it is seen twice, at {base}×{base} and {large}, and both answers are blended
(whose standard deviation is {spread:.2f}).

{table}"""


def theirs(folder: str) -> Any:
    """Random weights with all attention at work, and statistics of batch norm under which logits are of both signs."""
    package = ModuleType("transparent_background")
    package.__path__ = [f"{folder}/transparent_background"]
    sys.modules["transparent_background"] = package
    sys.path.append(folder)
    from transparent_background.InSPyReNet import InSPyReNet_SwinB
    torch.manual_seed(0)
    model = InSPyReNet_SwinB(64, False, [BASE, BASE], threshold=512)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
        if hasattr(module, "gamma"):
            nn.init.normal_(module.gamma)
    with torch.no_grad():
        model.train().forward_inspyre(torch.randn(2, 3, BASE, BASE))
    return model.eval()


class Ours(nn.Module):
    """Alpha of a picture that is seen once, or twice."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == BASE:
            return scaled(self.model(x))
        return scaled(blend(self.model(small(x)), self.model.pyramid(x)).d0)


class Theirs(Ours):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if x.shape[-1] == BASE else self.model(x, small(x))


def small(x: Tensor) -> Tensor:
    return nn.functional.interpolate(x, (BASE, BASE), mode="bilinear")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    zoo.list_models()
    rival = theirs(folder)
    model = timm.create_model("inspyrenet_swin_b", pretrained=True, pretrained_cfg_overlay=dict(state_dict=rival.state_dict())).eval()
    sides, differences, comparisons = (Ours(model).eval(), Theirs(rival).eval()), [], []
    for name, size in ((f"seen once, {BASE}×{BASE}", (BASE, BASE)), (f"seen twice, {LARGE[0]}×{LARGE[1]}", LARGE)):
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            alphas = [side(x) for side in sides]
        differences.append((alphas[0] - alphas[1]).abs().max().item())
        spread = alphas[0].std().item()
        comparisons.append(compare(name, PASSES[0], *sides, x, ROUNDS, time.process_time))
    table = Report(facts(1, {"all": "one picture"}, "float32", ROUNDS, "cpu", True), comparisons).markdown()
    found = next(iter(importlib.metadata.distributions(name="transparent-background", path=[folder])))
    once, twice = differences
    large = "×".join(map(str, LARGE))
    PAGE.write_text(HEAD.format(version=found.version, once=once, twice=twice, spread=spread, base=BASE, large=large, table=table))


if __name__ == "__main__":
    main(sys.argv[1])
