"""What is special to the U-Nets of the zoo: their arguments, and other networks on the way down."""
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from zoo.errors import InputError
from zoo.layers import AttentionGate, MultiAttentionGate
from zoo.measuring import model_table
from zoo.models import unet

WIDTHS = (4, 6, 8)


def make(**args):
    torch.manual_seed(0)
    return unet.UNet(**{"in_chans": 1, "widths": WIDTHS, **args}).eval()


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm3d), ("instance", nn.GroupNorm), ("group", nn.GroupNorm)])
@pytest.mark.parametrize("act_layer", ["leaky_relu", "gelu"])
def test_norms_and_activations(norm, kind, act_layer):
    model = make(norm=norm, act_layer=act_layer, spatial_dims=3, num_gates=2, deep_supervision=True).train()
    model(torch.randn(2, 1, 5, 8, 7)).square().sum().backward()
    assert count(model, kind) == 6 + 1 + 4 + 3  # encoder, signal, decoder, the one gated skip
    assert count(model, unet.get_act_layer(act_layer)) == 6 + 1 + 4
    if norm == "instance":
        assert all(module.num_groups == module.num_channels for module in model.modules() if isinstance(module, nn.GroupNorm))
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 1, 1, 1, 1)).isfinite().all()


def test_gates_are_on_every_skip_but_the_finest():
    assert [count(make(num_gates=n), AttentionGate) for n in (0, 1, 2)] == [0, 1, 2]
    assert count(make(num_gates=2), MultiAttentionGate) == 1 and count(make(num_gates=0, widths=(4, 6, 8, 9)), AttentionGate) == 0
    assert count(timm.create_model("unet3d", widths=WIDTHS), AttentionGate) == 0
    assert count(make(encoder="resnet18", in_chans=3, widths=None), AttentionGate) == 4


def test_deep_supervision_mixes_the_logits_of_all_levels():
    model = make(num_classes=3, deep_supervision=True)
    x = torch.randn(1, 1, 8, 12)
    maps = model.forward_features(x)
    assert [m.shape[1] for m in maps] == list(WIDTHS[:-1])
    logits = [nn.functional.interpolate(level(m), (8, 12), mode="bilinear") for level, m in zip(model.head.levels, maps, strict=True)]
    mixture = torch.einsum("oi,bihw->bohw", model.head.fuse.weight[..., 0, 0], torch.cat(logits, 1)) + model.head.fuse.bias[:, None, None]
    torch.testing.assert_close(model(x), mixture)


def test_light_decoder_is_lighter():
    full, light = (make(light_decoder=value) for value in (False, True))
    assert sum(p.numel() for p in light.parameters()) < sum(p.numel() for p in full.parameters())
    assert light(torch.randn(1, 1, 9, 7)).shape == (1, 2, 9, 7)


@pytest.mark.parametrize("encoder", ["test_resnet", "test_byobnet", "test_convnext"])
def test_any_hierarchical_model_is_an_encoder(encoder):
    model = timm.create_model("attention_unet", encoder=encoder, num_classes=3, in_chans=2).train()
    out = model(torch.randn(2, 2, 65, 50))
    assert out.shape == (2, 3, 65, 50)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_channels_last_feature_maps_are_turned():
    model = timm.create_model("attention_unet", encoder="swin_tiny_patch4_window7_224", encoder_args=dict(
        depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 1, 1), img_size=64)).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_pretrained_weights_go_through_to_the_encoder(tmp_path):
    torch.manual_seed(3)
    encoder = timm.create_model("biformer_nano")
    torch.save(encoder.state_dict(), tmp_path / "w.pth")
    args = dict(encoder_args=dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth"))))
    for model in (timm.create_model("attention_unet_biformer_nano", pretrained=True, **args),
                  timm.create_model("attention_unet", encoder="biformer_nano", pretrained=True, **args)):
        found = model.encoder.model.state_dict()
        expected = encoder.state_dict()
        assert all(torch.equal(value, expected[_original(name, expected)]) for name, value in found.items())


def _original(name, expected):
    """The name in the whole model: feature extraction flattens sequences, `stages_0` for `stages.0`."""
    return name if name in expected else name.replace("_", ".", 1) if name.replace("_", ".", 1) in expected else name


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(encoder="resnet18x"), "encoder must be a model that timm knows, got 'resnet18x'; did you mean resnet18"),
    (dict(encoder="test_vit", encoder_args=dict(img_size=64)), "encoder test_vit is not hierarchical"),
    (dict(encoder="resnet18", spatial_dims=3), "encoder must be None in 3-D"),
    (dict(encoder="test_resnet", widths=(4, 8)), "widths must be of the decoder's"),
    (dict(encoder_args=dict(depth=2)), "encoder_args are for an encoder"),
    (dict(widths=(8,)), "widths must have at least two levels"),
    (dict(norm="layer"), "norm must be one of batch, instance, group, got 'layer'"),
    (dict(act_layer="rleu"), "act_layer must be one of timm's, .* got 'rleu'"),
    (dict(spatial_dims=1), "spatial_dims must be 2 or 3, got 1"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, InputError), match=message):
        make(in_chans=3, **{"widths": None, **arguments})


@pytest.mark.parametrize(("dims", "shape", "message"), [
    (3, (1, 1, 8, 8), r"x must be \(B, 1, D, H, W\) in 3-D, got shape \(1, 1, 8, 8\)"),
    (2, (1, 1, 8, 8, 8), r"x must be \(B, 1, H, W\) in 2-D, got shape \(1, 1, 8, 8, 8\)"),
    (2, (1, 3, 8, 8), r"x must be \(B, 1, H, W\)"),
])
def test_inputs_of_another_kind_are_named(dims, shape, message):
    with pytest.raises(ValueError, match=message):
        make(spatial_dims=dims)(torch.zeros(shape))


def test_table_leaves_out_networks_around_others():
    assert "attention_unet3d" in model_table.listed() and "attention_unet_biformer_nano" not in model_table.listed()
    assert "| 64³ |" in model_table.model_table(["attention_unet3d_nano"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_an_encoder_begins_with_the_weights_of_a_classifiers_file(tmp_path, suffix):
    classifier = timm.create_model("biformer_nano", num_classes=7)
    path = tmp_path / f"classifier.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"model.{name}": value for name, value in classifier.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(classifier.state_dict(), path)
    model = timm.create_model("attention_unet", encoder="biformer_nano",
                              encoder_args=dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path))))
    given = {value.numpy().tobytes() for value in classifier.state_dict().values()}
    assert all(parameter.detach().numpy().tobytes() in given for parameter in model.encoder.parameters())
