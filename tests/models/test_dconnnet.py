"""What is special to DconnNet: its encoders, its classes, its prior, and authors' files for other classes."""
import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.models import dconnnet
from zoo.models.dconnnet import DconnNet


def make(name="dconnnet_nano", **args) -> DconnNet:
    torch.manual_seed(0)
    return timm.create_model(name, **args)


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("encoder", "args", "size"), [
    ("test_resnet", {}, (97, 65)), ("test_byobnet", {}, (64, 64)), ("test_convnext", {}, (33, 70)),
    ("litv2_nano", dict(depths=(1, 1, 1, 1)), (64, 50)),
])
def test_any_hierarchical_model_is_an_encoder(encoder, args, size):
    model = make(encoder=encoder, encoder_args=args, num_classes=3).train()
    out, prior = model(images(*size))
    assert out.shape == prior.shape == (2, 24, *size)
    (out.square().mean() + prior.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without, f"parameters without a finite gradient: {without}"
    with torch.no_grad():
        assert model.eval()(images(*size)).shape == (2, 3, *size)


@pytest.mark.parametrize(("classes", "channels"), [(1, 8), (2, 8), (3, 24), (4, 32)])
def test_losses_are_of_both_outputs_and_reach_everything(classes, channels):
    model = make(num_classes=classes).train()
    out = model(images(32, 40))
    assert [x.shape for x in out] == 2 * [(2, channels, 32, 40)]
    zoo.ConnectivityLoss()(out, torch.randint(max(2, classes), (2, 32, 40))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_prior_is_the_authors_projection_of_what_was_interpolated():
    model = make(num_classes=4).eval()
    maps = torch.randn(1, model.encoder.channels[-1], 2, 3)
    conv, norm, act, proj = model.prior
    theirs = proj(dconnnet.interpolate(act(norm(conv(maps))), 32))
    torch.testing.assert_close(dconnnet.interpolate(model.prior(maps), 32), theirs, atol=1e-5, rtol=1e-5)


def test_the_prior_excites_the_coarsest_map():
    excitation = make().eval().excitation
    x = torch.randn(1, excitation.proj.in_channels, 2, 3)
    with torch.no_grad():
        one, other = (excitation(x, torch.full((1, 8, 1, 1), value)) for value in (0.0, 9.0))
    assert (one - other).abs().max() > 1e-3


def test_dropped_channels_are_of_training_only():
    model = make(drop_rate=0.5)
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout2d)]
    assert len(drops) == 9 and all(module.p == 0.5 for module in drops)
    with torch.no_grad():
        assert torch.equal(model.eval()(images(32, 32)), model(images(32, 32)))


def test_scenes_say_where_a_level_matters():
    model = make().eval()
    with zoo.capture(model) as maps, torch.no_grad():
        model(images(64, 96))
    for i in range(4):
        attention = maps[f"spaces.{i}"]["attention"]
        assert attention.shape == (2, 1, 2 * 2**i, 3 * 2**i) and attention.min() > 0 and attention.max() < 1


def test_a_file_for_other_classes_gives_all_but_what_is_of_its_classes(tmp_path):
    model = make(num_classes=2)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    torch.manual_seed(7)
    other = timm.create_model("dconnnet_nano", num_classes=4, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    theirs, ours = model.state_dict(), other.state_dict()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) == (not name.startswith(("prior.", "excitation.encode.", "head."))) or not value.any() \
            or (value == 1).all(), name


def test_pretrained_weights_are_the_encoders(tmp_path):
    encoder = timm.create_model("polarized_resnet_nano")
    torch.save(encoder.state_dict(), tmp_path / "w.pth")
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    model = make(encoder="polarized_resnet_nano", pretrained=True, encoder_args=overlay)
    assert torch.equal(model.encoder.model.conv1[0].weight, encoder.conv1[0].weight)


def test_positions_and_channels_begin_as_they_are():
    gammas = [p for name, p in make().named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 16 and not any(p.any() for p in gammas)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(encoder="resnet34x"), "encoder must be a model that timm knows, got 'resnet34x'; did you mean resnet34"),
    (dict(encoder="test_vit", encoder_args=dict(img_size=64)), "encoder test_vit is not hierarchical"),
    (dict(encoder="test_resnet", encoder_args=dict(channels=(8, 8, 8, 12))), "8 must divide the coarsest one's channels; test_resnet has"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, InputError), match=message):
        make(**arguments)


def test_inputs_of_another_kind_are_named():
    with pytest.raises(ValueError, match=r"DconnNet: x must be \(B, 3, H, W\) in 2-D, got shape \(1, 1, 8, 8\)"):
        make()(torch.zeros(1, 1, 8, 8))
