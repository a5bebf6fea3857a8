"""NormGrad, against the authors' numbers and what the formula says."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from zoo.seeing.normgrad import AGGREGATES, PHASES, at_layers, local_map, moved, normgrad

GOLDEN = Path(__file__).parents[1] / "golden" / "normgrad"


class Network(nn.Module):
    """That of the reference vectors."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.act2 = nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.conv3, self.bn3 = nn.Conv2d(6, 8, 3, 2, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act2(self.conv2(F.max_pool2d(self.act1(self.bn1(self.conv1(x))), 2)))
        return self.head(self.bn3(self.conv3(x)).relu().mean((2, 3)))


def vector(case):
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    model = Network()
    model.load_state_dict({name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")})
    return model.eval(), tensors


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


@pytest.mark.parametrize(("case", "names"), [("grid_act2", ["act2"]), ("grid_combined", ["act1", "act2"])])
def test_every_phase_and_aggregate_of_the_authors(case, names):
    model, tensors = vector(case)
    found = at_layers(model, tensors["input"], 3, [model.get_submodule(name) for name in names], lambda x: x)
    for phase in PHASES:
        for aggregate in AGGREGATES:
            close(normgrad(*found, (12, 16), phase, aggregate)[0], tensors[f"{phase}.{aggregate}"])


def test_those_of_torchray():
    model, tensors = vector("torchray")
    (a,), (g,) = at_layers(model, tensors["input"], 3, [model.act2], lambda x: x)
    close(local_map(a, g), tensors["norm_grad"][0])
    close(local_map(a, g, "scaling", "filter_norm"), tensors["norm_grad_selective"][0])
    close(local_map(a, g, "scaling", "sum"), tensors["linear_approx"][0])
    _, (at_output,) = at_layers(model, tensors["input"], 3, [model.conv3], lambda x: x)
    patches = F.unfold(a, 3, padding=1, stride=2).unflatten(-1, at_output.shape[2:])
    close(local_map(patches, at_output), tensors["norm_grad_proper"][0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with moved(model, tensors["input"], 3, 0.05):
        (a,), (g,) = at_layers(model, tensors["input"], 3, [model.act2], lambda x: x)
    close(local_map(a, g), tensors["norm_grad_meta"][0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
