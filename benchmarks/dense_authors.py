"""DconnNet, A2N and HAN beside their authors' code, and DconnNet beside the U-Net that one would take instead: dense_authors.md beside it.

    git clone https://github.com/Zyun-Y/DconnNet FOLDER/DconnNet  # and haoyuc/A2N, wwlCape/HAN
    python -m benchmarks.dense_authors FOLDER

Same weights on both sides, drawn at random. DconnNet and A2N have no licence file: their code is run here, and is no part of the project.
"""
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

import zoo
from zoo.layers.connectivity import class_logits
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts

PAGE, ROUNDS = Path(__file__).with_suffix(".md"), 5
HEAD = """# Dense networks beside their authors' code

`python -m benchmarks.dense_authors FOLDER`: with the same random weights; outputs differ by at most {difference:.0e} of the largest.
Last, what one would take instead of DconnNet: the U-Net around the same encoder of segmentation-models-pytorch (rival).

{table}"""
OF_HAN = dict(n_resgroups=10, n_resblocks=20, n_feats=64, reduction=16, rgb_range=255, n_colors=3, res_scale=1, scale=[2])


def theirs(folder: Path, package: str, name: str) -> Any:
    """A module of `package` in `folder`, which every one of these repositories calls `model`."""
    found = ModuleType("model")  # without what the package itself imports
    found.__path__ = [str(folder / package)]
    with mock.patch.dict(sys.modules, model=found, torchsummary=ModuleType("torchsummary")):
        return importlib.import_module(f"model.{name}")


class First(nn.Module):
    """The first of a network's outputs, of connections what they vote for, as ours gives it outside of training."""

    def __init__(self, model: nn.Module, connections: bool = False):
        super().__init__()
        self.model, self.connections = model, connections

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        out = out[0] if isinstance(out, tuple) else out
        return class_logits(out, 1) if self.connections and not self.training else out


def pairs(folder: Path) -> dict[str, tuple[nn.Module, nn.Module, Tensor]]:
    """Ours, theirs and pictures."""
    torch.manual_seed(0)
    dconn, options = theirs(folder / "DconnNet", "model", "DconnNet"), SimpleNamespace(**OF_HAN)
    with mock.patch.object(dconn, "resnet34", lambda pretrained: theirs(folder / "DconnNet", "model", "resnet").resnet34()):
        connected = dconn.DconnNet(1)
    networks = {
        "dconnnet": (connected, (2, 3, 256, 256)),
        "a2n_x2": (theirs(folder / "A2N", "code/model", "aan").AAN(options), (1, 3, 96, 96)),
        "han_x2": (theirs(folder / "HAN", "src/model", "han").HAN(options), (1, 3, 48, 48)),
    }
    found: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {}
    for name, (rival, size) in networks.items():
        ours = timm.create_model(name, **(dict(num_classes=1) if name == "dconnnet" else {}))
        for norm in [module for module in rival.modules() if isinstance(module, nn.BatchNorm2d)]:
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        zoo.load_weights(ours, rival.state_dict())
        found[name] = ours, First(rival, name == "dconnnet"), 255 * torch.rand(size) if "_x" in name else torch.randn(size)
    return found


def main(folder: str) -> None:
    torch.set_num_threads(2)
    differences, comparisons, networks = [], [], pairs(Path(folder))
    for ours, rival, x in networks.values():
        with torch.no_grad():
            expected = rival.eval()(x)
            differences.append(((First(ours.eval())(x) - expected).abs().max() / expected.abs().max()).item())
    ours, _, x = networks["dconnnet"]
    rivals = {**networks, "dconnnet, a U-Net": (ours, smp.Unet("tu-resnet34", encoder_weights=None, classes=1), x)}
    for name, (ours, rival, x) in rivals.items():
        for kind in PASSES:
            said = f"{name}, {len(x)}×{x.shape[2]}×{x.shape[3]}"
            comparisons.append(compare(said, kind, First(ours), rival, x, ROUNDS, time.perf_counter))
    report = Report(facts(2, {"all": "of DconnNet, 1 of the others, sizes in the rows"}, "float32", ROUNDS, "cpu", True), comparisons)
    PAGE.write_text(HEAD.format(difference=max(differences), table=report.markdown()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
