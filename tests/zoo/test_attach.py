import copy
import io
import re
from functools import partial

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.layers import PolarizedSelfAttention, SelectiveKernelUnit

CNNS = {  # residual blocks, and a stage by its name with the block that the layer ends up in
    "resnet18": (8, "layer2", "layer2.1"),
    "mobilenetv2_050": (10, "blocks.1", "blocks.1.1"),
    "regnety_002": (13, "s3", "s3.b4"),
    "convnext_atto": (12, "stages.1", "stages.1.blocks.1"),
    "hrnet_w18_small": (23, "stage2.0.branches.1", "stage2.0.branches.1.1"),
}
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
every_cnn = pytest.mark.parametrize("name", CNNS)


def make(name="resnet18", **args) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **args).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)  # timm's zeros would hide a branch
    return model


def attached(model: nn.Module) -> dict[str, nn.Module]:
    return {name.partition(".attached")[0]: m for name, m in model.named_modules() if re.search(r"\.attached\.\d+$", name)}


def open_gates(model: nn.Module) -> nn.Module:
    for module in attached(model).values():
        nn.init.constant_(module.gate, 0.5)
    return model


@every_cnn
@pytest.mark.parametrize("layer", ["das", "polarized", "atconv", "sk"])
def test_every_residual_block_keeps_its_output_until_the_gate_opens(name, layer):
    model = make(name)
    before, names = model(IMAGES), set(model.state_dict())
    assert zoo.attach(model, layer) is model
    assert len(attached(model)) == CNNS[name][0]
    assert torch.equal(model(IMAGES), before)
    assert names < set(model.state_dict())
    assert not torch.allclose(open_gates(model)(IMAGES), before, rtol=1e-3)


@every_cnn
def test_a_stage_is_followed_after_its_last_block(name):
    _, stage, block = CNNS[name]
    model = zoo.attach(make(name), "polarized", where=stage)
    assert list(attached(model)) == [block]


@every_cnn
def test_the_layer_follows_the_module(name):
    """The next module's input is the layer's output, of the width that the layer was made for."""
    model = zoo.attach(make(name), lambda dim: nn.Conv2d(dim, dim, 1), keep_outputs=False)
    for where, follower in attached(model).items():
        seen = {}
        model.get_submodule(where).register_forward_hook(lambda module, args, output, seen=seen: seen.update(block=output))
        follower.register_forward_hook(lambda module, args, output, seen=seen: seen.update(layer=output))
        model(IMAGES)
        assert seen["block"] is seen["layer"] and seen["layer"].shape[1] == follower.layer.in_channels


def test_the_formula_of_the_gate():
    model = zoo.attach(make(), "polarized", where="layer4.1")
    plain, x = make().layer4[1], torch.randn(2, 512, 5, 3)
    follower = open_gates(model).layer4[1].attached[0]
    with torch.no_grad():
        y = plain(x)
        torch.testing.assert_close(model.layer4[1](x), 0.5 * y + 0.5 * follower.layer(y))


@every_cnn
def test_training_reaches_the_layer(name):
    model = zoo.attach(make(name), "polarized").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES).logsumexp(1).sum().backward()
        optimizer.step()
    for where, follower in attached(model).items():
        assert follower.gate.grad.abs().sum() > 0, where
        assert follower.layer.spatial_value.weight.grad.abs().sum() > 0, where


@every_cnn
def test_state_and_copies(name):
    model = open_gates(zoo.attach(make(name), "polarized"))
    with torch.no_grad():
        expected = model(IMAGES)
        other = zoo.attach(timm.create_model(name, num_classes=5).eval(), "polarized")
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(IMAGES), expected)
        assert torch.equal(copy.deepcopy(model)(IMAGES), expected)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_compiles_whole_and_exports(name):
    model = open_gates(zoo.attach(make(name), "polarized"))
    with torch.no_grad():
        expected = model(IMAGES)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(IMAGES), expected)
        program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        torch.testing.assert_close(program.module()(IMAGES[:1]), expected[:1], atol=1e-4, rtol=1e-4)


def test_a_whole_model_can_be_pickled():
    model, buffer = open_gates(zoo.attach(make(), "polarized")), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(IMAGES), model(IMAGES))


def test_patterns_names_and_repetition():
    model = zoo.attach(make(), PolarizedSelfAttention, where=["layer[12].0", "layer4"], layout="sequential")
    assert list(attached(model)) == ["layer1.0", "layer2.0", "layer4.1"]
    assert model.layer4[1].attached[0].layer.layout == "sequential"
    zoo.attach(model, partial(SelectiveKernelUnit, kernel_sizes=(3, 5, 7)), where="layer4.?")
    assert [len(model.layer4[i].attached) for i in (0, 1)] == [1, 2]
    assert isinstance(model.layer4[1].attached[1].layer, SelectiveKernelUnit)
    zoo.attach(model, "polarized", where="layer4")  # the sequence has not grown by what is attached
    assert len(model.layer4[1].attached) == 3


def test_features_grouping_and_mode():
    model = zoo.attach(timm.create_model("resnet18", features_only=True), "polarized", where="layer?")
    assert model.training and all(module.training for module in model.modules())
    assert [x.shape[1] for x in model(IMAGES)] == [64, 64, 128, 256, 512]
    frozen = make()
    frozen.layer1.eval()
    statistics = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    zoo.attach(frozen, "polarized")
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in frozen.named_buffers() if name in statistics)
    groups = timm.models.group_parameters(frozen, frozen.group_matcher())
    assert any("layer1.0.attached.0.gate" in group and "layer1.0.conv1.weight" in group for group in groups.values())


def test_precision_and_channels_follow_the_model():
    model = zoo.attach(make(in_chans=1).to(torch.bfloat16), "polarized")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(IMAGES[:, :1].bfloat16()).isfinite().all()


class Alike(nn.Module):
    """Runs its children one after the other and then does something else, so that nothing can live among them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layer="polarised"), "there is no layer 'polarised' to attach; .*did you mean polarized"),
        (dict(where="layer4.2"), "the model has no module 'layer4.2'; did you mean .*layer4.0"),
        (dict(where=["layer1", "bloks.*"]), "the model has no module 'bloks.*'"),
        (dict(where="global_pool"), r"global_pool puts out \(1, 512\), not one map"),
        (dict(where="fc"), r"fc puts out \(1, 5\), not one map"),
        (dict(layer=lambda dim: nn.Conv2d(dim, 2 * dim, 1), keep_outputs=False), "Conv2d at layer1.0 turns .* it has to keep the shape"),
        (dict(example=torch.zeros(1, 4, 8, 8)), r"ResNet does not run on an example of shape \(1, 4, 8, 8\)"),
    ],
)
def test_what_cannot_be_attached_is_named_and_leaves_no_trace(arguments, message):
    model = make()
    before = repr(model)
    with pytest.raises(InputError, match=message) as raised:
        zoo.attach(model, **dict(dict(layer="polarized"), **arguments))
    assert "\n" not in str(raised.value)
    assert repr(model) == before and not any(module._forward_hooks for module in model.modules())
    assert model(IMAGES).shape == (2, 5)


def test_models_that_give_it_no_place():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(InputError, match="Sequential has no residual blocks; say with `where`"):
        zoo.attach(plain, "polarized")
    with pytest.raises(InputError, match="nothing can be attached to 0, which treats its children alike"):
        zoo.attach(nn.Sequential(Alike()), "polarized", where="0")
    with pytest.raises(InputError, match="0 is an empty sequence"):
        zoo.attach(nn.Sequential(nn.Sequential(), nn.Conv2d(3, 3, 1)), "polarized", where="0")
    with pytest.raises(InputError, match="Linear has no convolutions"):
        zoo.attach(nn.Linear(3, 3), "polarized")
    unused = make()
    unused.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match="spare does not run when the model does"):
        zoo.attach(unused, "polarized", where="spare")
    zoo.attach(plain, "polarized", where="0")
    assert plain(IMAGES).shape[1] == 4


@pytest.mark.parametrize(("name", "layer", "message"), [
    ("test_vit", "das", r"VisionTransformer work on tokens, .* zoo.replace_attention; .*mlp_layer=zoo.models.deit.BroadcastingMlp"),
    ("pvt_v2_b0", "polarized", r"PyramidVisionTransformerV2 work on tokens, .* zoo.layers.ContextBroadcast, has to be written into"),
    ("test_vit", "routing", r"routing has no layer that turns a map, .* as .*atconv, .*zoo.list_models\(mechanism='routing'\)"),
    ("biformer_nano", "das", r"stages\S* puts out maps with their channels last, \(B, H, W, C\), of shape \(1, 16, 16, 32\)"),
    ("litv2_nano", "polarized", "channels last"),
    ("tiny_vit_5m_224", "polarized", "channels last"),
])
def test_transformers_are_told_what_they_are(name, layer, message):
    model = timm.create_model(name)
    names = set(model.state_dict())
    with pytest.raises(InputError, match=message):
        zoo.attach(model, layer)
    assert set(model.state_dict()) == names


def test_what_is_said_of_vision_transformers_works():
    model = timm.create_model("test_vit", mlp_layer=zoo.models.deit.BroadcastingMlp)
    assert any(isinstance(module, zoo.layers.ContextBroadcast) for module in model.modules())
    assert model(torch.randn(1, 3, 160, 160)).shape == (1, 1000)
    assert len(attached(zoo.attach(timm.create_model("test_vit"), "das", where="patch_embed.proj"))) == 1
