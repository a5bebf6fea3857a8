"""Importance of heads, by the authors' numbers, and networks without some of them."""
import copy
import io
import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import zoo
from zoo.errors import InputError
from zoo.heads import _heads_of

GOLDEN = Path(__file__).parents[1] / "golden" / "head_importance"
VIT = partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
ROPE = partial(timm.create_model, "vit_small_patch16_rope_224", img_size=32, depth=1, num_classes=3)


class Gated(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, gated=True, **kwargs)


def replaced(layer: str, build=VIT, **args) -> nn.Module:
    return zoo.replace_attention(build(), layer, **args)


BUILT = {
    "vit": VIT,
    "gated": lambda: VIT(attn_layer=Gated),
    "rope": ROPE,
    "deit": partial(timm.create_model, "deit_nano_patch16_224_cb", img_size=32, num_classes=3),
    "fan": partial(timm.create_model, "tap_fan_nano", num_classes=3),
    "litv2": partial(timm.create_model, "litv2_nano", num_classes=3),
    **{layer: partial(replaced, layer) for layer in ("softmax", "entmax15", "entmax", "cog", "hedgehog", "sparsifiner")},
    "pyramid_sparse": partial(replaced, "pyramid_sparse", block_size=(8, 8), prefix_tokens=1),
    "softmax, rope": partial(replaced, "softmax", ROPE),
    **{f"gated by {gate}": partial(replaced, "softmax", gate=gate) for gate in ("head", "element")},
}


def batches(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 3, size, size), torch.tensor([0, 2])) for _ in range(2)]


def removable(model: nn.Module) -> dict[str, list[int]]:
    """Every other head of every layer, but one of each layer."""
    return {name: list(range(1, heads.count, 2)) for name, heads in _heads_of(model).items()}


def masked(model: nn.Module, heads: dict[str, list[int]]) -> nn.Module:
    """A copy whose heads of these numbers put out zeros."""
    model = copy.deepcopy(model)
    for name, of in _heads_of(model).items():
        def hook(proj: nn.Module, inputs: tuple[Tensor], count: int = of.count, gone: list[int] = heads[name]) -> tuple[Tensor]:
            c = inputs[0].unflatten(-1, (count, -1)).clone()
            c[..., gone, :] = 0
            return (c.flatten(-2),)
        of.proj.register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize("case", ["average_pool", "class_token"])
def test_the_authors_importance_and_what_they_prune(case):
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        tensors, config = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118
    pruned, at_least = config.pop("heads_pruned"), config.pop("at_least_heads_per_layer")
    model = VisionTransformer(**config)
    model.load_state_dict({name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")})
    x, labels = tensors["input"].float(), tensors["labels"]
    importance = zoo.head_importance(model, [(x[:2], labels[:2]), (x[2:], labels[2:])])
    torch.testing.assert_close(torch.stack(list(importance.values())).float(), tensors["importance"].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.eval()(x), tensors["output"].float(), rtol=1e-5, atol=1e-5)
    total = tensors["kept"].numel()
    zoo.prune_heads(model, (pruned + 0.5) / total, importance, at_least)
    assert [block.attn.num_heads for block in model.blocks] == tensors["kept"].sum(1).tolist()
    torch.testing.assert_close(model(x), tensors["output_pruned"].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILT)
def test_pruned_networks_put_out_what_they_do_with_heads_of_zeros(name):
    model, x = BUILT[name]().eval(), torch.randn(2, 3, 32, 32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    heads, before = removable(model), sum(p.numel() for p in model.parameters())
    expected = masked(model, heads)(x)
    assert not torch.allclose(model(x), expected, atol=1e-4)
    assert zoo.prune_heads(model, heads) == heads
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < before
    model.train()(x).sum().backward()
    assert all(p.grad is not None for layer in _heads_of(model).values() for p in layer.proj.parameters())


def test_a_layer_may_lose_all_heads():
    model, x = VIT().eval(), torch.randn(2, 3, 32, 32)
    heads = {"blocks.0.attn": [0, 1, 2], "blocks.1.attn": []}
    expected = masked(model, heads)(x)
    zoo.prune_heads(model, heads, at_least=0)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    importance = zoo.head_importance(model, batches())
    assert importance["blocks.0.attn"].numel() == 0


@pytest.mark.parametrize("name", BUILT)
def test_importance_is_the_first_order_change_of_the_loss(name):
    """Of one image and one token position at a time it is |dL| when the head is scaled down: here summed over all by hand."""
    model = BUILT[name]().double()
    data = [(x.double(), y) for x, y in batches()]
    importance = zoo.head_importance(model, data)
    assert all(model.state_dict()[key].grad is None for key in model.state_dict())
    layer, heads = next(iter(_heads_of(model).items()))
    taken = []
    hook = heads.proj.register_forward_pre_hook(lambda proj, inputs: taken.append(inputs[0]))
    expected = torch.zeros(heads.count, dtype=torch.float64)
    model.eval()
    for x, y in data:
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        c = taken.pop()
        gradient, = torch.autograd.grad(loss, c)
        expected += (c * gradient).unflatten(-1, (heads.count, -1)).sum(-1).abs().reshape(-1, heads.count).sum(0)
    hook.remove()
    torch.testing.assert_close(importance[layer], expected / expected.norm())


def test_networks_are_left_as_they_were():
    model = VIT()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    frozen = zoo.head_importance(model, [(torch.ones(1, 3, 32, 32), torch.tensor([1]))])
    model.requires_grad_(False)
    torch.testing.assert_close(zoo.head_importance(model, [(torch.ones(1, 3, 32, 32), torch.tensor([1]))]), frozen)
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradient_checkpointing_changes_nothing():
    model, data = VIT(), batches()
    plain = zoo.head_importance(model, data)
    model.set_grad_checkpointing()
    torch.testing.assert_close(zoo.head_importance(model, data), plain)


def test_pruned_networks_are_saved_loaded_compiled_and_exported(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'zoo-attention[export]'")
    model, x = VIT().eval(), torch.randn(1, 3, 32, 32)
    removed = zoo.prune_heads(model, 0.4, zoo.head_importance(model, batches()))
    assert sum(map(len, removed.values())) == 2
    file = io.BytesIO()
    torch.save({"heads": removed, "state_dict": model.state_dict()}, file)
    file.seek(0)
    saved, again = torch.load(file), VIT().eval()
    zoo.prune_heads(again, saved["heads"])
    again.load_state_dict(saved["state_dict"])
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(torch.compile(again, fullgraph=True, backend="aot_eager")(x), model(x))
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_frozen():
    model = VIT()
    model.blocks[0].requires_grad_(False)
    zoo.prune_heads(model, {"blocks.0.attn": [0], "blocks.1.attn": [0]})
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    assert all(p.requires_grad for p in model.blocks[1].parameters())


@pytest.mark.parametrize(("build", "arguments", "said"), [
    (VIT, ({"blocks.2.attn": [0]},), "the model has no layer 'blocks.2.attn' with heads; did you mean"),
    (VIT, ({"blocks.0.attn": [3]},), "blocks.0.attn has heads 0 to 2, and was to lose 3"),
    (VIT, ({"blocks.0.attn": [0, 1, 2]},), "blocks.0.attn has 3 heads, of which at least 1 have to stay, and was to lose 3"),
    (BUILT["litv2"], ({"stages.3.blocks.0.attn.lo": range(8)}, None, 0), "of which at least 1 have to stay, and was to lose 8"),
    (VIT, (0.3,), "a share of heads is taken out by importance"),
    (VIT, (1.5, {}), "heads must be a share between 0 and 1, or heads by names of layers, got 1.5"),
    (VIT, (0.3, {"blocks.0.attn": torch.ones(3)}), "importance is of"),
    (partial(timm.create_model, "resnet18"), ({},), "ResNet has no attention whose heads can be told apart"),
    (partial(timm.create_model, "vit_small_patch16_rope_mixed_224", img_size=32, depth=1), ({},), "rotates every head"),
    (partial(replaced, "rela"), ({},), "blocks.0.attn has NormalizedAttention.*rela.* whose heads depend on each other"),
    (partial(replaced, "moh"), ({},), "whose heads depend on each other"),
    (partial(replaced, "softmax"), ({"blocks.0.attn": [0, 1, 2]}, None, 0), "of which at least 1 have to stay"),
    (partial(VIT, scale_attn_norm=True), ({},), "has a norm over all its heads before the projection"),
])
def test_what_cannot_be_pruned_is_refused_and_left(build, arguments, said):
    model = build()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=said):
        zoo.prune_heads(model, *arguments)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


def test_importance_needs_batches():
    with pytest.raises(InputError, match="head_importance was given no batches"):
        zoo.head_importance(VIT(), [])
