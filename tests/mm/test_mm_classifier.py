from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from timm.data import create_transform
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.mm.classifier import ImageClassifier
from zoo.mm.config import load_config
from zoo.mm.optim import AutocastOptimWrapper, param_groups

ARGS = {"num_classes": 10, "in_chans": 1, "img_size": 32}


def _batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_with_mixup_against_its_definition(loss, smoothing):
    task = ImageClassifier("test_vit", ARGS, mixup={"mixup_alpha": 0.8, "prob": 1.0}, label_smoothing=smoothing, loss=loss).eval()
    inputs, targets = _batch()
    np.random.seed(7)
    found = task(inputs.clone(), targets, mode="loss")["loss"]
    np.random.seed(7)
    lam = [np.random.rand(), np.random.beta(0.8, 0.8)][1]
    logits = task(lam * inputs + (1 - lam) * inputs.flip(0))
    one_hot = (1 - smoothing) * torch.eye(10)[targets] + smoothing / 10
    soft = lam * one_hot + (1 - lam) * one_hot.flip(0)
    if loss == "cross_entropy":
        expected = -(soft * logits.log_softmax(-1)).sum(-1).mean()
    else:
        probability = logits.sigmoid()
        expected = -(soft * probability.log() + (1 - soft) * (1 - probability).log()).mean()
    torch.testing.assert_close(found, expected)


def test_attention_diversification_is_added_and_logged():
    inputs, targets = _batch()
    plain = ImageClassifier("test_vit", ARGS).eval()
    task = ImageClassifier("test_vit", ARGS, attention_diversification=0.5, attention_threshold=0.9).eval()
    task.load_state_dict(plain.state_dict())
    without, found = (each(inputs, targets, mode="loss") for each in (plain, task))
    _, similarity = zoo.AttentionDiversificationLoss(0.9)(plain.model, inputs)
    assert set(without) == {"loss"} and set(found) == {"loss", "attention_similarity"}
    torch.testing.assert_close(found["loss"], without["loss"] + 0.5 * similarity)
    torch.testing.assert_close(found["attention_similarity"], similarity.detach())
    _, logged = task.parse_losses(found)
    assert logged["loss"] == found["loss"] and logged["attention_similarity"] == similarity


def test_load_balancing_is_added_and_logged():
    inputs, targets = _batch()
    args = dict(num_classes=10, in_chans=1, depths=(1, 1, 1, 1))
    plain = ImageClassifier("moh_transnext_nano", args).eval()
    task = ImageClassifier("moh_transnext_nano", args, load_balancing=0.5).eval()
    task.load_state_dict(plain.state_dict())
    without, found = (each(inputs, targets, mode="loss") for each in (plain, task))
    _, balance = zoo.LoadBalancingLoss()(plain.model, inputs)
    assert set(without) == {"loss"} and set(found) == {"loss", "load_balance"} and not found["load_balance"].requires_grad
    torch.testing.assert_close(found["loss"], without["loss"] + 0.5 * balance)
    torch.testing.assert_close(found["load_balance"], balance.detach())
    with pytest.raises(InputError, match="has no layer whose tokens pick heads"):
        ImageClassifier("test_vit", ARGS, load_balancing=0.5)(inputs, targets, mode="loss")


def test_what_parts_should_be_is_added_and_logged():
    """Without being asked for, as nothing else would train stage 1; the logits' own term is that of the recipe."""
    inputs, targets = _batch()
    args = dict(num_classes=10, in_chans=1, depth=1, img_size=32, patch_size=8)
    plain = ImageClassifier("ifam_nano_patch16_224", args, label_smoothing=0.1, part_discovery=False).eval()
    task = ImageClassifier("ifam_nano_patch16_224", args, label_smoothing=0.1, part_discovery=dict(weights=dict(equivariance=0))).eval()
    task.load_state_dict(plain.state_dict())
    without, found = (each(inputs, targets, mode="loss") for each in (plain, task))
    discovery = zoo.PartDiscoveryLoss(dict(equivariance=0), criterion=torch.nn.CrossEntropyLoss(label_smoothing=0.1))
    _, loss, terms = discovery(plain.model, inputs, targets)
    assert set(without) == {"loss"} and set(found) == {"loss", *(f"part_{name}" for name in terms)} and len(terms) == 7
    torch.testing.assert_close(found["loss"], loss)
    for name, term in terms.items():
        torch.testing.assert_close(found[f"part_{name}"], term.detach())
    torch.testing.assert_close(terms["stage_2"], without["loss"])
    _, logged = task.parse_losses(found)
    assert logged["loss"] == found["loss"]
    chosen = ImageClassifier("ifam_nano_patch16_224", args).train()(inputs, targets, mode="loss")
    assert set(chosen) == {"loss", "part_equivariance", *(f"part_{name}" for name in terms)}
    with pytest.raises(InputError, match="holds, 0 networks that discover parts"):
        ImageClassifier("test_vit", ARGS, part_discovery={})(inputs, targets, mode="loss")


def test_predictions_are_probabilities():
    inputs, targets = _batch()
    predictions = ImageClassifier("test_vit", ARGS).eval()(inputs, targets, mode="predict")
    assert [prediction["target"] for prediction in predictions] == list(targets)
    torch.testing.assert_close(torch.stack([prediction["scores"] for prediction in predictions]).sum(1), torch.ones(8))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "test_vti"}, "test_vit"),
    ({"name": "test_vit", "args": {"depht": 2}}, "depht"),
    ({"name": "test_vit", "mixup": {"alpha": 1}}, "alpha"),
    ({"name": "test_vit", "loss": "hinge"}, "hinge"),
    ({"name": "test_vit", "part_discovery": {"wieghts": {}}}, "wieghts"),
    ({"name": "test_vit", "part_discovery": {"weights": {"entrpy": 1}}}, "did you mean entropy"),
])
def test_what_cannot_be_created(arguments, message):
    with pytest.raises(InputError, match=message):
        ImageClassifier(**arguments)


def _named(network: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {names[parameter]: group for group in groups for parameter in group["params"]}


def test_what_is_decayed():
    network = ImageClassifier("test_vit", ARGS).model
    groups = _named(network, param_groups(network, lr=1.0, weight_decay=0.05))
    assert set(groups) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        decayed = parameter.ndim > 1 and name not in network.no_weight_decay()
        assert groups[name]["weight_decay"] == (0.05 if decayed else 0.0), name
    assert groups["pos_embed"]["weight_decay"] == 0.0


def test_layer_decay_and_multipliers():
    network = ImageClassifier("test_vit", ARGS).model
    groups = _named(network, param_groups(network, 1.0, 0.05, layer_decay=0.5, lr_multipliers={r"mlp\.fc1": 0.01}))
    depth = len(network.blocks)
    assert groups["head.weight"]["lr"] == 1.0
    assert groups["blocks.0.attn.qkv.weight"]["lr"] == pytest.approx(0.5 ** (depth if "norm.weight" not in groups else depth))
    assert groups["blocks.0.mlp.fc1.weight"]["lr"] == pytest.approx(groups["blocks.0.mlp.fc2.weight"]["lr"] / 100)
    assert groups["patch_embed.proj.weight"]["lr"] < groups["blocks.0.attn.qkv.weight"]["lr"]
    for multipliers in ({}, {r"\.norm1": 0.0, r"norm": 0.5}):
        groups = _named(network, param_groups(network, 1.0, 0.05, decay_multipliers=multipliers))
        assert groups["blocks.0.attn.qkv.bias"]["weight_decay"] == groups["pos_embed"]["weight_decay"] == 0.05
        assert groups["blocks.0.norm1.weight"]["weight_decay"] == (0.0 if multipliers else 0.05)
        assert groups["blocks.0.norm2.bias"]["weight_decay"] == (0.025 if multipliers else 0.05)


def test_mixed_precision_on_the_cpu():
    layer = nn.Linear(4, 4)
    wrapper = AutocastOptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    with wrapper.optim_context(layer):
        output = layer(torch.ones(1, 4))
    assert output.dtype == torch.bfloat16
    before = layer.weight.detach().clone()
    wrapper.update_params(output.float().sum())
    torch.testing.assert_close(layer.weight, before - 0.1)
    wrapper.load_state_dict(wrapper.state_dict())
    with pytest.raises(InputError, match="float16"):
        AutocastOptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), dtype="float16")


def test_gradients_are_clipped_in_mixed_precision():
    layer = nn.Linear(4, 4, bias=False)
    wrapper = AutocastOptimWrapper(torch.optim.SGD(layer.parameters(), lr=1.0), clip_grad={"max_norm": 0.5})
    before = layer.weight.detach().clone()
    wrapper.update_params(100 * layer(torch.ones(1, 4)).sum())
    assert (layer.weight - before).norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("name", "drop_path"), [("tiny", 0.1), ("small", 0.15), ("base", 0.4)])
def test_imagenet_configs_say_what_the_paper_does(name, drop_path):
    config = load_config(f"biformer_{name}_in1k", ["data_root=/elsewhere"])
    assert timm.is_model(config.model.name) and config.model.name == f"biformer_{name}"
    assert config.model.args.drop_path_rate == drop_path
    assert config.train_dataloader.dataset.root == config.val_dataloader.dataset.root == "/elsewhere"
    assert config.train_dataloader.sampler.repeats == 3
    optimizer = config.optim_wrapper.optimizer
    assert optimizer.lr / config.auto_scale_lr.base_batch_size == pytest.approx(5e-4 / 512)
    transform = create_transform(**config.train_dataloader.dataset.transform)
    assert [type(step).__name__ for step in transform.transforms] == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor", "Normalize", "RandomErasing"]


@pytest.mark.parametrize("name", ["litv2_s_in1k", "litv2_m_in1k", "litv2_b_in1k", "litv2_b_384_in1k", "litv2_nano_digits"])
def test_places_of_merged_tokens_learn_at_a_hundredth_of_the_rate(name):
    config = load_config(name)
    model = ImageClassifier("litv2_nano")
    groups = _named(model.model, build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups)
    rate = config.optim_wrapper.optimizer.lr
    slow = {parameter for parameter, group in groups.items() if group["lr"] != rate}
    assert slow == {f"stages.{i}.downsample.offset.weight" for i in (1, 2, 3)}
    assert all(groups[parameter]["lr"] == pytest.approx(rate / 100) and groups[parameter]["weight_decay"] for parameter in slow)


def test_litv2_learns_as_its_authors_let_it():
    for name, drop_path in (("s", 0.2), ("m", 0.3), ("b", 0.5)):
        config = load_config(f"litv2_{name}_in1k")
        assert (config.model.name, config.model.args.drop_path_rate) == (f"litv2_{name}", drop_path)
    assert config.optim_wrapper.optimizer.lr / config.auto_scale_lr.base_batch_size == pytest.approx(5e-4 / 512)
    assert config.optim_wrapper.optimizer.weight_decay == 0.05 and config.optim_wrapper.clip_grad.max_norm == 5.0
    assert config.train_dataloader.sampler.repeats == 1


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "classification").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_sound(path):
    """Its keys are known, its model is one of the zoo and is built, and data and model agree in classes and channels."""
    config = load_config(path)
    assert config.model.name in zoo.list_models() and path.stem.rsplit("_", 1)[0] == config.model.name
    model = MODELS.build(config.model)
    transform = config.train_dataloader.dataset.transform
    channels = len(transform.get("mean", (0, 0, 0)))
    model.train()
    losses = model(torch.randn(2, channels, 64, 64), torch.tensor([0, 1]), mode="loss")
    assert losses["loss"].isfinite()
    digits = config.train_dataloader.dataset.type == "DigitsDataset"
    assert model.num_classes == (10 if digits else 1000)
