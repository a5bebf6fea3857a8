"""Where and how models are made: device and dtype, storage that is initialised later, copies, pooling, scripting."""
import copy
import io
import pickle

import pytest
import timm
import torch
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn

import zoo
import zoo.layers
from zoo.models import unet

MODELS = [name for name in zoo.list_models() if name not in unet.ENCODERS or "_nano" in name]
CLASSIFIERS = [name for name in MODELS if not zoo.models.is_dense(name)]
OF_PICTURES = ["a2n_nano_x2", "han_nano_x2"]  # which give pictures, and have no classes
OF_ONE = ("inspyrenet", "msinet", "sum")  # whose answer is one map
LIGHT = [name for name in MODELS if "_nano" in name or name == "das_mobilenetv2_100"]
FAMILIES = [name for name in LIGHT if name not in unet.ENCODERS and name != "das_mobilenetv2_100"] + ["attention_unet_sknet_nano"]
DEVIANT = ["fan_tiny_8_p4_hybrid", "biformer_stl", "polarized_hrnet_w18_s", "deit_tiny_patch16_224_cbs", "unet", "sknet26"]
LAYERS = {name: kind for name in zoo.layers.__all__ if isinstance(kind := getattr(zoo.layers, name), type)}
ARGS = dict(
    AttentionGate=(16, 24), MultiAttentionGate=(16, 24), ChannelProcessing=(16, 2, 32), FullyAttentionalBlock=(16, 2), TokenMixing=(16, 2),
    HedgehogAttention=(2, 8), NormalizedAttention=(2, 8), PyramidSparseAttention=(2, 8, (3, 5)), SelfAttention=(16, 2),
    EfficientProbing=(16, 4), LayerAttention=(), MixtureOfHeads=(16, 4, 1, 2), MixtureOfHeadAttention=(4, 4, 16),
    MultipleInstanceHead=(16, 2), PartDiscovery=(16, 3), ScaleInvariantContextAttention=(16, 8, (4, 6)),
    SparsifinerAttention=(2, 8, (3, 4)), DualAttention=(16, 1, 1), RelationalAttention=(16, 2))
ALL_PARTS = dict(  # arguments with which a layer has every parameter it can have
    BiLevelRoutingAttention=dict(soft_routing=True, differentiable_routing=True, learned_routing=True),
    ContextBroadcast=dict(scaled=True), FullyAttentionalBlock=dict(num_scales=2), PolarizedSelfAttention=dict(layout="sequential"),
    NormalizedAttention=dict(normalizer="rela"), ScaleInvariantContextAttention=dict(laplacian=True),
    SelfAttention=dict(normalizer="entmax", gate="head", qkv_bias=True))


def classes(name: str) -> int:
    """How many a network of this name is made for, where it takes more than one number."""
    return 1 if name.startswith(OF_ONE) else 5


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def image(model: nn.Module, dtype=torch.float32) -> torch.Tensor:
    sizes = (8, 8, 8) if getattr(model, "spatial_dims", 2) == 3 else (32, 32)
    return torch.randn(2, model.in_chans, *sizes, generator=torch.Generator().manual_seed(1)).to(dtype)


def make(name: str, num_classes: int, **args) -> nn.Module:
    return timm.create_model(name, **({} if name in OF_PICTURES else {"num_classes": min(num_classes, classes(name))}), **args)


def layer(name: str, **args) -> nn.Module:
    return LAYERS[name](*ARGS.get(name, (16,)), **ALL_PARTS.get(name, {}), **args)


def check_made(make):
    """`make` obeys device and dtype, and what `to_empty` leaves is initialised as what is made at once."""
    made = make(device="meta", dtype=torch.float64)
    for name, value in tensors(made).items():
        assert value.device.type == "meta", f"{name} is not on the device"
        assert value.dtype == torch.float64 or not value.is_floating_point(), f"{name} is {value.dtype}"
    made = made.to_empty(device="cpu")
    with torch.no_grad():
        for value in tensors(made).values():
            value.fill_(float("nan") if value.is_floating_point() else 77)
    return made


def check_alike(made: nn.Module, make):
    """Every tensor is drawn from the distribution that `make` draws it from; constants are equal."""
    one, other = tensors(make()), tensors(make())
    assert tensors(made).keys() == one.keys()
    for name, value in tensors(made).items():
        assert value.isfinite().all(), f"{name} was not initialised"
        value, first, second = value.double(), one[name].double(), other[name].double()
        if torch.equal(first, second):
            torch.testing.assert_close(value, first, msg=lambda text, name=name: f"{name}: {text}")
        elif value.numel() < 8:
            assert value.abs().max() < 10, name
        else:  # means and deviations of n numbers, of two samples, six errors apart at most
            error = 6 * first.std() * (2 / first.numel()) ** 0.5
            assert (value.mean() - first.mean()).abs() <= error, f"{name}: mean {value.mean()}, not {first.mean()}"
            assert (value.std() - first.std()).abs() <= error, f"{name}: deviation {value.std()}, not {first.std()}"


@pytest.mark.parametrize("name", [*FAMILIES, "das_mobilenetv2_100", *DEVIANT])
def test_a_model_made_without_storage_is_initialised_later(name):
    made = check_made(lambda **dd: make(name, 5, **dd))
    made.init_weights()
    check_alike(made, lambda: make(name, 5))
    with torch.no_grad():
        assert made.eval()(image(made, torch.float64)).isfinite().all()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in [*FAMILIES, *DEVIANT]])
def test_every_model_is_made_on_its_device(name):
    check = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    for path, value in tensors(check).items():
        assert value.device.type == "meta" and (value.dtype == torch.bfloat16 or not value.is_floating_point()), path


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_made_without_storage_is_initialised_later(name):
    made = check_made(lambda **dd: layer(name, **dd))
    made.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    if name != "FullyAttentionalBlock":
        check_alike(made, lambda: layer(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_computed_that_a_checkpoint_could_not_hold(name):
    """With a state loaded, a model from `to_empty` is the model: there are no further buffers, or they can be made again."""
    model = timm.create_model(name).eval()
    other = timm.create_model(name, device="meta").to_empty(device="cpu").eval()
    other.load_state_dict(model.state_dict())
    reinit_non_persistent_buffers(other)
    with torch.no_grad():
        assert torch.equal(other(image(model)), model(image(model)))


def test_initialising_twice_draws_anew_and_keeps_the_constructors_options():
    model = timm.create_model("das_resnet_nano", zero_init_last=False)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert not torch.equal(before["conv1.weight"], model.conv1.weight)
    assert (model.layer1[0].block.bn2.weight == 1).all()
    model.init_weights(zero_init_last=True)
    assert (model.layer1[0].block.bn2.weight == 0).all()
    assert (model.layer1[0].das.offset.weight == 0).all()


def test_a_unet_is_initialised_with_the_weights_its_encoder_was_asked_for(tmp_path):
    encoder = timm.create_model("sknet_nano")
    torch.save(encoder.state_dict(), tmp_path / "w.pth")
    args = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    model = timm.create_model("attention_unet_sknet_nano", encoder_args=args)
    wanted = model.encoder.model.conv1[0].weight.clone()
    nn.init.zeros_(model.encoder.model.conv1[0].weight)
    model.init_weights()
    assert torch.equal(model.encoder.model.conv1[0].weight, wanted) and torch.equal(wanted, encoder.conv1[0].weight)


@pytest.mark.parametrize("name", [name for name in LIGHT if name not in OF_PICTURES and not name.startswith(OF_ONE)])
def test_a_new_classifier_is_where_and_what_the_model_is(name):
    model = timm.create_model(name, device="meta", dtype=torch.float64)
    for classes in (0, 7):
        model.reset_classifier(classes)
    assert all(p.device.type == "meta" and p.dtype == torch.float64 for p in model.parameters())


@pytest.mark.parametrize("name", [*FAMILIES, "unet3d", "polarized_hrnet_w18_s"])
def test_copies_and_pickles(name):
    args = dict(widths=(4, 8)) if name == "unet3d" else {}
    model = make(name, 3, **args).eval()
    model.requires_grad_(False)
    wanted = model(image(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image(model)), wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(image(model)), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_deterministic_algorithms_and_inference_mode(name):
    model = make(name, 3)
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            torch.manual_seed(0)
            out = model(image(model))
            out = out[0] if isinstance(out, tuple) else out
            grads.append(torch.autograd.grad(out.square().sum(), model.parameters(), materialize_grads=True))
        assert all(map(torch.equal, *grads))
    finally:
        torch.use_deterministic_algorithms(False)
    model.eval()
    with torch.inference_mode():
        out = model(image(model))
    assert out.is_inference()
    torch.testing.assert_close(out.clone(), model(image(model)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*LIGHT, *DEVIANT])
def test_scripting_is_refused_in_a_sentence(name):
    with pytest.raises(NotImplementedError, match=r"^\w+ cannot be scripted: .*torch.export"):
        torch.jit.script(timm.create_model(name, device="meta"))


@pytest.mark.parametrize("name", LAYERS)
def test_scripting_a_layer_is_refused_wherever_it_is(name):
    with pytest.raises(NotImplementedError, match=f"^{name} cannot be scripted: "):
        torch.jit.script(nn.Sequential(layer(name, device="meta")))


POOLS = ["avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "token", "unknown", ""]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name in LIGHT])
def test_every_kind_of_pooling_is_obeyed_or_refused_at_once(name, pool):
    """As an argument and later; `head_hidden_size` is the width that the classifier is given."""
    token = name.startswith(("deit", "ifam", "lambda_deit", "tap_fan", "vidat"))  # have a class token
    before = name.startswith(("attnet", "tap_fan", "deit", "ifam", "lambda_deit", "vidat"))  # have a norm after pooling, of the map's width
    plain = "deit" in name or name.startswith(("ifam", "vidat"))
    refused = pool == "unknown" or pool == "token" and not token or before and "cat" in pool or plain and "fast" in pool
    x = torch.empty(2, 3, 64, 64, device="meta")
    classes = 0 if not pool else 5  # linear classifiers take no map, in timm's networks neither
    if refused:
        with pytest.raises((ValueError, AssertionError), match="pool"):
            timm.create_model(name, global_pool=pool, device="meta")
    later = timm.create_model(name, device="meta").eval()
    if refused:
        with pytest.raises((ValueError, AssertionError), match="pool"):
            later.reset_classifier(5, pool)
        return
    later.reset_classifier(classes, pool)
    for model in (timm.create_model(name, global_pool=pool, num_classes=classes, device="meta").eval(), later):
        before_head = model.forward_head(model.forward_features(x), pre_logits=True)
        if pool:
            assert before_head.shape == (2, model.head_hidden_size) and model(x).shape == (2, 5)
            assert model.head_hidden_size == model.num_features * (1 + pool.endswith("catavgmax"))
        else:
            assert model(x).ndim == 4 and model.head_hidden_size == model.num_features
