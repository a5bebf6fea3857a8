"""Every registered classifier is a timm citizen; others: test_unet_citizenship, test_restoring. New families join by being
registered.

What a family's code decides once (compiling, exporting, precisions, memory formats, large images and the like) is tested on
the family's light models by default, and on every model with ZOO_EVERY_MODEL=1; that takes an hour. What hangs on a model's own
arguments is always tested on every model.
"""
import copy
import io
import os
import re

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from shallow import SHALLOW
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import zoo

MODELS = [name for name in zoo.list_models() if not zoo.models.is_dense(name)]
LIGHT = [name for name in MODELS if "_nano" in name]
FAMILIES = sorted({timm.model_entrypoint(name).__module__ for name in MODELS})

BEHIND_MASKS = {"ifam": ("stage_1.", "parts.", "part_head.")}  # of what hard masks keep gradients of the logits from; it has losses

every_model = pytest.mark.parametrize("name", MODELS)
models_for_long_tests = pytest.mark.parametrize("name", MODELS if os.environ.get("ZOO_EVERY_MODEL") else LIGHT)


def make(name: str, **args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **args).eval()


@pytest.fixture(scope="module", params=MODELS)
def built(request) -> tuple[str, nn.Module]:
    """A model's name and the model, for all tests that can take the same one: to fill a large one at random takes longer than to run it."""
    return request.param, make(request.param, num_classes=10, drop_path_rate=0.1)


@pytest.fixture(scope="module", params=MODELS)
def backbone(request) -> tuple[str, nn.Module]:
    return request.param, make(request.param, features_only=True, in_chans=4)


def learning(model: nn.Module, name: str) -> list[str]:
    """The parameters that the logits reach."""
    others = BEHIND_MASKS.get(name.partition("_")[0], ())
    return [n for n, _ in model.named_parameters() if not n.startswith(tuple(others))]


def images(size=(64, 64), batch=2, channels=3) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def test_every_family_has_a_light_model():
    assert {timm.model_entrypoint(name).__module__ for name in LIGHT} == set(FAMILIES)


def test_no_name_of_timm_is_taken():
    """In a process that has not imported the zoo."""
    import subprocess
    import sys

    names = subprocess.run([sys.executable, "-c", "import timm; print(*timm.list_models())"], capture_output=True, text=True, check=True)
    assert not set(names.stdout.split()) & set(zoo.list_models())


def test_forward_and_backward(built):
    name, model = built[0], copy.deepcopy(built[1]).train()
    out = model(images())
    assert out.shape == (2, 10) and out.isfinite().all()
    out.square().sum().backward()
    without = [n for n in learning(model, name) if (grad := model.get_parameter(n).grad) is None or not grad.isfinite().all()]
    assert not without, f"parameters without a finite gradient: {without}"


@every_model
def test_defaults_are_documented(name):
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    assert cfg["input_size"][0] == 3 and model.num_classes == cfg["num_classes"] == 1000
    modules = dict(model.named_modules())
    first = [cfg["first_conv"]] if isinstance(cfg["first_conv"], str) else cfg["first_conv"]
    assert all(isinstance(modules[n], nn.Conv2d) and modules[n].in_channels == 3 for n in first)
    assert isinstance(modules[cfg["classifier"]], nn.Linear) and modules[cfg["classifier"]] is model.get_classifier()


def check_sizes(model, sizes, channels=3):
    """Of a classifier or of a backbone."""
    for size in sizes:
        with torch.no_grad():
            out = model(images(size, 1, channels))
        if isinstance(out, torch.Tensor):
            assert out.shape == (1, model.num_classes) and out.isfinite().all(), size
        else:
            assert [features.shape[1] for features in out] == model.feature_info.channels(), size


def test_small_and_odd_sizes(built):
    check_sizes(built[1], ((97, 161), (32, 32)))


def test_features_of_small_and_odd_sizes_and_another_number_of_channels(backbone):
    check_sizes(backbone[1], ((97, 161), (32, 32)), channels=4)


@models_for_long_tests
def test_large_sizes(name):
    for model in (make(name), make(name, features_only=True)):
        check_sizes(model, ((224, 224), (640, 427)))


@models_for_long_tests
def test_an_image_does_not_depend_on_its_batch(name):
    model, x = make(name), images(batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-5)


def test_features_only(backbone):
    name, model = backbone
    with torch.no_grad():
        features, info = model(images((64, 96), channels=4)), model.feature_info
        for x, channels, reduction in zip(features, info.channels(), info.reduction(), strict=True):
            assert x.shape == (2, channels, -(-64 // reduction), -(-96 // reduction))  # what patches do not divide is padded
        last = len(features) - 1
        for picked in ((last,), (0, last), (1,)) if name in LIGHT else ():
            chosen = make(name, features_only=True, out_indices=picked)(images((64, 96)))
            assert [x.shape for x in chosen] == [features[i].shape for i in picked]


def test_forward_intermediates(built):
    model, whole, x = copy.deepcopy(built[1]), copy.deepcopy(built[1]), images()
    with torch.no_grad():
        final, intermediates = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        assert [i.shape[1] for i in intermediates] == [info["num_chs"] for info in model.feature_info]
        last, first = model.forward_intermediates(x, indices=1, intermediates_only=True), model.forward_intermediates(
            x, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(last[0], intermediates[-1]) and torch.equal(first[0], intermediates[0])
        taken = model.prune_intermediate_layers(1)
        assert taken == [len(intermediates) - 1]
        whole.prune_intermediate_layers([0])
        assert torch.equal(whole.forward_intermediates(x, indices=[0], intermediates_only=True)[0], intermediates[0])
        assert whole(x).shape[1] == whole.num_features == model.feature_info[0]["num_chs"]


def test_classifier_can_be_reset_and_taken_apart(built):
    name, model, x = built[0], copy.deepcopy(built[1]), images()
    with torch.no_grad():
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3) and model.num_classes == 3
        model.reset_classifier(0)
        assert model.forward_head(features).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(x).ndim == 4
        model.reset_classifier(0, "max")
        assert model.forward_head(features).shape == (2, model.num_features)
        if name in LIGHT:
            assert make(name, num_classes=0, global_pool="max")(x).shape == (2, model.num_features)


@models_for_long_tests
def test_gradient_checkpointing_changes_nothing(name):
    x, grads, stored = images(), [], []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(x)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        stored.append(sum(kept))
    torch.testing.assert_close(*grads)
    assert stored[1] < 0.7 * stored[0]


@models_for_long_tests
def test_input_channels(name):
    for channels in (1, 4):
        with torch.no_grad():
            assert make(name, in_chans=channels)(images((32, 32), channels=channels)).shape == (2, 1000)


@models_for_long_tests
def test_weights_for_three_channels_load_into_any_number(name, tmp_path):
    torch.save(make(name).state_dict(), tmp_path / "w.pth")
    overlay = dict(file=str(tmp_path / "w.pth"))
    with torch.no_grad():
        model = make(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
        other = make(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4)
        assert model(images(channels=1)).shape == (2, 1000) and other(images()).shape == (2, 4)


@models_for_long_tests
def test_channels_last(name):
    model, x = make(name), images()
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters(), materialize_grads=True)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    grads = torch.autograd.grad(model(x).square().sum(), model.parameters(), materialize_grads=True)
    rounding = torch.finfo(x.dtype).eps * max(theirs.norm() for theirs in expected)  # all that a bias has that a softmax cancels, as FAN's
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).norm() <= max(1e-4 * theirs.norm(), rounding)


@models_for_long_tests
def test_bfloat16_autocast(name):
    model, x = make(name), images()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    expected = model(x)
    assert out.dtype == torch.bfloat16 and (out - expected).abs().max() < 0.1 * expected.abs().max().clamp(min=0.1)
    assert all((grad := model.get_parameter(n).grad).isfinite().all() and grad.dtype == torch.float32 for n in learning(model, name))


@models_for_long_tests
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(name, dtype):
    with torch.no_grad():
        out = make(name).to(dtype)(images().to(dtype))
    assert out.dtype == dtype and out.isfinite().all()


@models_for_long_tests
def test_compiles_whole(name):
    """One graph, forward and backward. Turning it into machine code takes minutes, so only light models go that far."""
    model, x = make(name), images((63, 85))
    expected = model(x)
    gradient = torch.autograd.grad(expected.sum(), model.get_classifier().weight)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), model.get_classifier().weight), gradient, atol=1e-4, rtol=1e-4)
    if name in LIGHT:
        torch.compiler.reset()
        model = make(name, **SHALLOW.get(name, {}))
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)


@models_for_long_tests
def test_exports(name):
    model = make(name)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (images(),), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images(batch=3)), model(images(batch=3)), atol=1e-5, rtol=1e-5)


@models_for_long_tests
def test_state_survives_saving(name, tmp_path):
    model, x = make(name), images()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    torch.manual_seed(7)
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "model.pth"))).eval()
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


@every_model
def test_groups_cover_every_parameter(name):
    model = timm.create_model(name, device="meta")
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())
    matched = re.compile("|".join(f"(?:{p})" for p in _patterns(model.group_matcher())))
    head = [n for n, _ in model.named_parameters() if not matched.match(n)]
    assert all(n.startswith(model.pretrained_cfg["classifier"].split(".")[0]) for n in head), f"in no group: {head}"
    assert set(model.no_weight_decay()) <= {n for n, _ in model.named_parameters()}


def _patterns(matcher: dict) -> list[str]:
    found = []
    for value in matcher.values():
        found += [value] if isinstance(value, str) else [entry[0] if isinstance(entry, tuple) else entry for entry in value]
    return found


@models_for_long_tests
def test_encoder_of_a_unet(name):
    """Plain vision transformers, whose maps are all of one stride, are refused in words."""
    if len({info["reduction"] for info in make(name).feature_info}) == 1:
        with pytest.raises(ValueError, match="downsampling pattern"):
            smp.Unet(f"tu-{name}", encoder_weights=None, classes=2)
        return
    unet = smp.Unet(f"tu-{name}", encoder_weights=None, classes=2, encoder_depth=5)
    out = unet.eval()(images((64, 96)))
    assert out.shape == (2, 2, 64, 96)
    out.square().sum().backward()


@every_model
def test_recipe_of_optimisers(name):
    """timm's layer-wise decay, built from the model's own groups."""
    model = timm.create_model(name, device="meta")
    groups = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.8)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert len({g["lr_scale"] for g in groups}) > 4
