from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from timm.models.hrnet import cfg_cls
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.models.polarized import PolarizedHRNet
from zoo.seeing import attributions
from zoo.seeing.attributions import ATTRIBUTIONS, BiasGradients, heat

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = (64, 96)
CLASSIFIERS = [name for name in zoo.list_models("*_nano*") if not zoo.models.is_dense(name)]
FAMILIES = {  # one of each, three of timm's; HRNet with fewer blocks than registered ones have
    name: partial(timm.create_model, name, num_classes=2) for name in (*CLASSIFIERS, "test_resnet", "test_efficientnet")
} | {
    "polarized_hrnet": partial(PolarizedHRNet, cfg_cls["hrnet_w18_small"], layout="sequential", num_classes=2),
    "test_vit": partial(timm.create_model, "test_vit", num_classes=2, img_size=SIZE),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_every_attribution(name, monkeypatch):
    monkeypatch.setattr(attributions, "STEPS", 2)  # faster, and nothing here depends on more
    torch.manual_seed(0)
    model = FAMILIES[name]().train()
    nn.init.normal_(model.get_classifier().weight)  # heads start near 0, where gradients are lost in rounding
    image = torch.randn(1, 3, *SIZE)
    for method in ATTRIBUTIONS:
        found = [heat(model, image, target, method) for target in range(2)]
        for one in found:
            assert one.shape == SIZE and torch.isfinite(one).all() and one.min() >= 0
        # Grad-CAM may find nothing for a class; of a head that sees the class token alone, it finds nothing for any in the last block.
        assert max(one.max() for one in found) > 0 and (found[0] != found[1]).any(), method
    assert all(module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_gradients_stay_the_callers():
    model = timm.create_model("test_resnet").eval()
    model.conv1[0].weight.grad = torch.ones_like(model.conv1[0].weight)
    for method in ATTRIBUTIONS:
        with torch.no_grad():
            heat(model, torch.randn(1, 3, 32, 32), 0, method)
    there = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert list(there) == ["conv1.0.weight"] and there["conv1.0.weight"].eq(1).all()


class Piecewise(nn.Module):
    """Piecewise linear, with layers made in another order than they are used in, one used twice and one never."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(6, 4, 1)
        self.unused = nn.Conv2d(3, 3, 1)
        self.norm_act = BatchNormAct2d(6, inplace=True)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.mix = nn.Linear(6, 6)
        self.first = nn.Conv2d(3, 6, 3, stride=2)
        self.group = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward_features(self, x):
        x = self.norm_act(self.first(x))
        x = self.twice(torch.relu(self.plain(self.twice(x))))
        x = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.last(self.group(x) + x)

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


class AuthorsNetwork(nn.Module):
    """That of the reference vector."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv3, self.bn3 = nn.Conv2d(6, 8, 3, 2, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward_features(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        return self.bn3(self.conv3(self.conv2(x).relu())).relu()

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize("case", ["fullgrad/network"])
def test_reference_vector(case):
    vector = load_file(GOLDEN / f"{case}.safetensors")
    model = AuthorsNetwork()
    model.load_state_dict({name.removeprefix("state/"): value for name, value in vector.items() if name.startswith("state/")})
    model.eval()
    torch.testing.assert_close(model(vector["input"])[0, 3], vector["logit"])
    found, expected = heat(model, vector["input"], 3, "fullgrad"), vector["map"][0, 0]
    assert (found - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


def test_input_and_biases_times_gradients_add_up_to_the_logit():
    torch.manual_seed(0)
    model = Piecewise().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    image = torch.randn(1, 3, 17, 17, dtype=torch.float64, requires_grad=True)
    pairs = BiasGradients(model)
    logit = pairs(image)[0, 3]
    logit.backward()
    assert sorted(pairs.layers) == ["first", "group.0", "last", "mix", "norm_act", "plain", "twice", "twice"]
    terms = [float((bias[:, None, None] * gradient[0]).sum()) for bias, gradient in zip(pairs.biases, pairs.gradients, strict=True)]
    total = (image.grad * image).sum().item() + sum(terms) + model.head.bias[3].item()
    np.testing.assert_allclose(total, logit.item(), rtol=1e-9)
    assert min(map(abs, terms)) > 1e-3  # each of them counts


def test_a_registered_network_of_relus_adds_up():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
    image = torch.randn(1, 3, 48, 48, dtype=torch.float64, requires_grad=True)
    pairs = BiasGradients(model)
    logit = pairs(image)[0, 2]
    logit.backward()
    terms = sum(float((bias[:, None, None] * gradient[0]).sum()) for bias, gradient in zip(pairs.biases, pairs.gradients, strict=True))
    np.testing.assert_allclose((image.grad * image).sum().item() + terms + model.fc.bias[2].item(), logit.item(), rtol=1e-9)


@pytest.mark.parametrize("name", ["litv2_nano", "biformer_nano", "das_resnet_nano"])
def test_biases_are_paired_with_their_own_gradients(name):
    """The sum of the gradients over positions is the gradient of the bias itself."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    nn.init.normal_(model.get_classifier().weight)
    pairs = BiasGradients(model)
    pairs(torch.randn(1, 3, 64, 64))[0, 1].backward()
    assert len(pairs.layers) > 20 and len(set(pairs.layers)) == len(pairs.layers)
    for layer, gradient in zip(pairs.layers, pairs.gradients, strict=True):
        bias = model.get_submodule(layer).bias
        if bias is not None:
            torch.testing.assert_close(gradient.sum((0, 2, 3)), bias.grad, rtol=1e-3, atol=1e-4 * bias.grad.abs().max().item() + 1e-9)


def test_what_cannot_be_explained_is_one_sentence(monkeypatch):
    model = timm.create_model("test_vit", img_size=32, depth=1)
    with pytest.raises(InputError, match="gradcam looks at the last block but one of a network of tokens; VisionTransformer has 1"):
        heat(model, torch.randn(1, 3, 32, 32), 0, "gradcam")
    monkeypatch.setattr(model, "forward_features", lambda x: [x])
    with pytest.raises(InputError, match="gradcam needs features that lie on the picture; those of VisionTransformer are a list"):
        heat(model, torch.randn(1, 3, 32, 32), 0, "gradcam")
