"""U-Nets as citizens of timm, as far as dense outputs go: they have no features_only, no pooling and no single classifier."""
import io

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import zoo
from zoo.models import unet

MODELS = [name for name in zoo.list_models() if timm.model_entrypoint(name).__module__ == "zoo.models.unet"]
LIGHT = ["attention_unet_nano", "attention_unet3d_nano"]
SIZE = {2: (32, 32), 3: (8, 8, 8)}
light = pytest.mark.parametrize("name", LIGHT)
light_or_around_another = pytest.mark.parametrize("name", [*LIGHT, "attention_unet_sknet_nano"])


def make(name: str, **args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **args).eval()


def images(model: nn.Module, size=None, batch=2) -> torch.Tensor:
    size = SIZE[model.spatial_dims] if size is None else size[:model.spatial_dims]
    return torch.randn(batch, model.in_chans, *size, generator=torch.Generator().manual_seed(1))


def test_every_hierarchical_network_of_the_zoo_is_an_encoder():
    """Families join by a line in zoo.models.unet; what decides is their light models' own feature maps."""
    for name in zoo.list_models("*_nano"):
        if zoo.models.is_dense(name):
            continue
        reductions = [info["reduction"] for info in timm.create_model(name).feature_info]
        hierarchical = reductions == sorted(set(reductions))
        family = timm.model_entrypoint(name).__module__
        siblings = [other for other in zoo.list_models() if timm.model_entrypoint(other).__module__ == family]
        assert all((f"attention_unet_{other}" in MODELS) == hierarchical for other in siblings), family


@pytest.mark.parametrize("name", [name for name in MODELS if name not in unet.ENCODERS or "_nano" in name])
def test_forward_and_backward(name):
    widths = {} if name in unet.ENCODERS else dict(widths=(4, 6, 8, 10, 12))
    model = make(name, num_classes=5, **widths).train()
    x = images(model, (33, 40, 8))
    out = model(x)
    assert out.shape == (2, 5, *x.shape[2:]) and out.isfinite().all()
    out.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without, f"parameters without a finite gradient: {without}"


@light_or_around_another
@pytest.mark.parametrize("size", [(1, 1, 1), (7, 3, 2), (45, 38, 11)], ids=str)
def test_output_has_the_size_of_any_input(name, size):
    model = make(name, num_classes=3)
    x = images(model, size, batch=1)
    with torch.no_grad():
        assert model(x).shape == (1, 3, *x.shape[2:])


@light
def test_what_is_repeated_at_the_borders_is_the_last_slice(name):
    model = make(name)
    size = [model.reduction * 2 - 1] * model.spatial_dims
    x = images(model, size, batch=1)
    longer = x
    for axis in range(2, x.ndim):
        longer = torch.cat([longer, longer.narrow(axis, -1, 1)], axis)
    cut = (slice(None), slice(None), *(slice(n) for n in size))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(longer)[cut])


@light_or_around_another
def test_an_image_does_not_depend_on_its_batch(name):
    model = make(name)
    x = images(model, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-5)


@light_or_around_another
def test_defaults_are_documented(name):
    model = make(name)
    cfg = model.pretrained_cfg
    assert cfg["input_size"][0] == model.in_chans and len(cfg["input_size"]) == 1 + model.spatial_dims
    assert cfg["num_classes"] == model.num_classes
    modules = dict(model.named_modules())
    listed = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert {n for n in listed if n in modules} >= {f"head.levels.{i}" for i in range(len(model.head.levels))}
    if cfg["first_conv"]:
        assert modules[cfg["first_conv"]].in_channels == model.in_chans


@light_or_around_another
def test_classifier_can_be_reset_and_taken_apart(name):
    model = make(name, num_classes=5)
    x = images(model)
    with torch.no_grad():
        maps = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(maps), model(x))
        assert model.forward_head(maps, pre_logits=True).shape[1] == model.num_features
        model.reset_classifier(3)
        assert model(x).shape[1] == model.num_classes == 3
        model.reset_classifier(0)
        assert model(x).shape[1] == make(name, num_classes=0)(x).shape[1] == model.num_features


@light
def test_gradient_checkpointing_changes_nothing(name):
    grads, stored = [], []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            out = model(images(model))
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        stored.append(sum(kept))
    torch.testing.assert_close(*grads)
    assert stored[1] < 0.7 * stored[0]


@light_or_around_another
@pytest.mark.parametrize("channels", [1, 4])
def test_input_channels(name, channels):
    model = make(name, in_chans=channels)
    with torch.no_grad():
        assert model(images(model)).shape[1] == model.num_classes


@light_or_around_another
def test_state_survives_saving_and_fits_other_classes(name, tmp_path):
    model = make(name)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    torch.manual_seed(7)
    same, other = (timm.create_model(name, **overlay, **args).eval() for args in ({}, dict(num_classes=7)))
    with torch.no_grad():
        assert torch.equal(model(images(model)), same(images(model)))
        assert other(images(model)).shape[1] == 7
    assert torch.equal(other.decoder[0].conv.conv1.weight, model.decoder[0].conv.conv1.weight)


@light
def test_memory_formats_give_the_same(name):
    model = make(name)
    x = images(model)
    layout = torch.channels_last if model.spatial_dims == 2 else torch.channels_last_3d
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    model = model.to(memory_format=layout)
    grads = torch.autograd.grad(model(x.to(memory_format=layout)).square().sum(), model.parameters())
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm().clamp(min=1e-3)


@light
def test_precisions(name):
    model = make(name)
    x = images(model, (32, 32) if model.spatial_dims == 2 else (16, 16, 16))  # torch 2.15 on the CPU: no bfloat16 gradients of 2×2×2 maps
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert (out - expected).abs().max() < 0.1 * expected.abs().max().clamp(min=0.1)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    for dtype in (torch.float16, torch.bfloat16):
        with torch.no_grad():
            out = make(name).to(dtype)(x.to(dtype))
        assert out.dtype == dtype and out.isfinite().all()


@light
def test_compiles_whole(name):
    model = make(name)
    x = images(model, (31, 21, 9))
    expected = model(x)
    wanted = torch.autograd.grad(expected.sum(), model.get_classifier().parameters())
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), model.get_classifier().parameters()), wanted, atol=1e-4, rtol=1e-4)


@light
def test_exports_and_loads(name):
    model = make(name)
    program = torch.export.export(model, (images(model),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = images(model, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x), atol=1e-5, rtol=1e-5)


@light_or_around_another
def test_groups_cover_every_parameter(name):
    model = make(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())
    groups = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.8)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert len({g["lr_scale"] for g in groups}) > 4


@light_or_around_another
def test_feature_maps_are_not_offered(name):
    with pytest.raises(RuntimeError, match="features_only is not implemented"):
        make(name, features_only=True)


@light_or_around_another
def test_every_gate_reports_its_map_at_its_skips_resolution(name):
    model = make(name)
    x = images(model, (31, 21, 9), batch=1)
    padded = [-(-n // model.reduction) * model.reduction for n in x.shape[2:]]
    with zoo.capture(model) as maps, torch.no_grad():
        model(x)
    gates = [n for n, module in model.named_modules() if isinstance(module, zoo.layers.AttentionGate)]
    attention = [maps[name]["attention"] for name in gates]
    assert gates
    fine = [r for r in model.encoder.reductions[:-1] if r > 1]
    sizes = {tuple(n // r for n in padded) for r in fine}
    assert {tuple(a.shape[2:]) for a in attention} == sizes
    assert all((a > 0).all() and (a < 1).all() and a.shape[:2] == (1, 1) for a in attention)
