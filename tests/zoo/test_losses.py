"""The attention diversification loss of whole networks, against the attention that they spell out."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import zoo
from zoo.errors import InputError
from zoo.kernels.attention_similarity.reference import row_similarity
from zoo.layers import TokenMixing
from zoo.measuring.model_benchmark import _peak_memory
from zoo.models.biformer import GlobalAttention

THRESHOLD = 0.9
NETWORKS = {  # with the number of their layers
    "test_vit": (dict(img_size=64), 6),
    "deit_nano_patch16_224_cb": ({}, 4),
    "tap_fan_nano": ({}, 4),
    "biformer_nano": ({}, 1),
}


def make(name, **args):
    """With attention that is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **args).eval()
    for layer in model.modules():
        if isinstance(layer, (Attention, GlobalAttention, TokenMixing)):
            for linear in (layer.q, layer.kv) if isinstance(layer, TokenMixing) else (layer.qkv,):
                linear.weight.data.mul_(10)
    return model


def images(batch=2, size=(64, 64)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def spelled_out(model, x):
    """The logits and the loss from attention that is made anew, all at once, from what goes into each layer."""
    similarities = []

    def record(layer, inputs):
        x = inputs[0]
        if isinstance(layer, TokenMixing):
            attention = layer.attention(x)
        else:
            q, k, _ = layer.qkv(x).flatten(1, -2).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        similarities.append(row_similarity(attention.mean(1), THRESHOLD))

    handles = [layer.register_forward_pre_hook(record) for layer in model.modules()
               if isinstance(layer, (Attention, GlobalAttention, TokenMixing))]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out, sum(similarities) / len(similarities), len(similarities)


def step(model, x):
    model.zero_grad()
    out, similarity = zoo.AttentionDiversificationLoss(THRESHOLD)(model, x)
    (out.square().sum() + similarity).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", NETWORKS)
def test_finds_the_layers_and_has_their_value_and_gradient(name):
    args, layers = NETWORKS[name]
    model, x = make(name, **args), images()
    out, similarity = zoo.AttentionDiversificationLoss(THRESHOLD)(model, x)
    expected_out, expected, found = spelled_out(model, x)
    assert found == layers and 0.1 < expected.item() < 0.99
    torch.testing.assert_close((out, similarity), (expected_out, expected))
    parameters = [p for name, p in model.named_parameters() if ".q" in name]
    for ours, theirs in zip(*(torch.autograd.grad(x, parameters, allow_unused=True) for x in (similarity, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_attention_may_be_spelled_out_and_stays_so():
    model, x = make("test_vit", img_size=64), images()
    expected = step(model, x)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(step(model, x), expected, atol=1e-5, rtol=1e-4)
    assert not any(block.attn.fused_attn for block in model.blocks)


@pytest.mark.parametrize("name", ["test_vit", "tap_fan_nano"])
def test_gradient_checkpointing_changes_nothing(name):
    model, x = make(name, **NETWORKS[name][0]), images()
    expected = step(model, x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(step(model, x), expected, atol=1e-5, rtol=1e-4)


def test_leaves_nothing_in_the_network():
    model, x = make("test_vit", img_size=64), images()
    before, flags = model(x), [vars(m).get("fused_attn") for m in model.modules()]
    zoo.AttentionDiversificationLoss()(model, x)
    assert torch.equal(model(x), before)
    assert not _get_current_function_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert [vars(m).get("fused_attn") for m in model.modules()] == flags


def test_failing_networks_leave_nothing_either():
    model = make("test_vit", img_size=64)
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(AssertionError, match="Input height"):
        zoo.AttentionDiversificationLoss()(model, images(size=(65, 64)))
    assert not _get_current_function_mode_stack() and not model.blocks[0].attn.fused_attn


@pytest.mark.parametrize("name", ["attnet_nano", "test_resnet", "xcit_nano_12_p16_224"])
def test_networks_without_such_attention_are_told(name):
    with pytest.raises(ValueError, match="no layer in which all tokens of an image attend to one another"):
        zoo.AttentionDiversificationLoss()(make(name), images())


def test_bad_settings_are_told():
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        zoo.AttentionDiversificationLoss(-1)
    model = make("test_vit", img_size=64)
    model.set_grad_checkpointing()
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(ValueError, match="leave one of checkpointing and fused_attn=False"):
        zoo.AttentionDiversificationLoss()(model, images())


def test_compiles_whole():
    model, x, loss = make("deit_nano_patch16_224_cb"), images(), zoo.AttentionDiversificationLoss(THRESHOLD)
    compiled = torch.compile(lambda x: loss(model, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(model, x))


def test_autocast():
    model, x, loss = make("deit_nano_patch16_224_cb"), images(), zoo.AttentionDiversificationLoss(THRESHOLD)
    with torch.autocast("cpu", torch.bfloat16):
        _, similarity = loss(model, x)
    similarity.backward()
    assert similarity.dtype == torch.float32 and abs(similarity - loss(model, x)[1]) < 0.03


def test_memory_of_a_step_at_1024_tokens_and_12_layers():
    def plain(model: nn.Module, x: torch.Tensor) -> None:
        model(x).sum().backward()

    def diversified(model: nn.Module, x: torch.Tensor) -> None:
        out, similarity = zoo.AttentionDiversificationLoss()(model, x)
        (out.sum() + similarity).backward()

    model = timm.create_model("deit_nano_patch16_224_cb", embed_dim=48, depth=12, img_size=64, patch_size=2)
    without, with_it = (_peak_memory(run, model, images(1)) for run in (plain, diversified))
    one_attention = 4 * 3 * 1025**2
    assert with_it < 1.3 * without < 12 * one_attention  # less than what keeping all of them would cost


@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_a_bias_is_refused_as_that(fused):
    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3)
    for block in model.blocks:
        block.attn.fused_attn = fused
    with pytest.raises(InputError, match="Beit adds a bias or a mask to the attention of all tokens, as BEiT its relative"):
        zoo.AttentionDiversificationLoss()(model, torch.randn(2, 3, 32, 32))


def test_nearly_uniform_attention_has_nothing_above_the_threshold():
    """What a new transformer's loss is, and stays if its attention stays so."""
    model = timm.create_model("test_vit", img_size=64)
    assert zoo.AttentionDiversificationLoss(2.0)(model, images())[1] == 0
    assert zoo.AttentionDiversificationLoss(0.9)(model, images())[1] > 0.5


def linear(size=64, **args):
    """A network with Hedgehog attention, and the one that it was."""
    teacher = make("test_vit", img_size=size, **args)
    student = make("test_vit", img_size=size, **args)
    return zoo.replace_attention(student, "hedgehog"), teacher


def test_distillation_is_the_cross_entropy_of_the_teachers_attention():
    student, teacher = linear()
    maps = []

    def record(layer, inputs):
        q, k, _ = layer.qkv(inputs[0]).reshape(*inputs[0].shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        maps.append((q.detach(), k.detach(), (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).detach()))

    for block in teacher.blocks:
        block.attn.register_forward_pre_hook(record)
    teacher(images())
    losses = []
    for block, (q, k, attention) in zip(student.blocks, maps, strict=True):
        mechanism = block.attn.mechanism
        ours = mechanism.feature_map_q(q) @ mechanism.feature_map_k(k).mT
        losses.append(-(attention * (ours / ours.sum(-1, keepdim=True)).log()).sum(-1).mean())
    expected, found = sum(losses) / len(losses), zoo.AttentionDistillationLoss()(student, images())
    torch.testing.assert_close(found, expected)
    found.backward()
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in student.named_parameters() if ".feature_map_" in name}
    features = [parameter for name, parameter in student.named_parameters() if ".feature_map_" in name]
    gradients = [parameter.grad for parameter in features]
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, features)), atol=1e-6, rtol=1e-4)
    assert not any(module._forward_hooks for module in student.modules())


def test_distillation_brings_the_attention_closer():
    student, teacher = linear()
    distillation, x = zoo.AttentionDistillationLoss(), images()
    optimizer = torch.optim.Adam([p for name, p in student.named_parameters() if ".feature_map_" in name], 1e-2)
    far, before = F.mse_loss(student(x), teacher(x)).item(), distillation(student, x).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = distillation(student, x)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.98 * before
    assert F.mse_loss(student(x), teacher(x)).item() < far


def test_distillation_keeps_no_attention_and_says_what_it_is_not_for():
    student, _ = linear(size=160)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        zoo.AttentionDistillationLoss()(student, images(1, (160, 160))).backward()
    attention = student.blocks[0].attn
    tokens, heads = 101, attention.num_heads
    assert max(t.numel() for t in kept) < heads * tokens * tokens
    with pytest.raises(InputError, match="VisionTransformer has no Hedgehog attention to train; zoo.replace_attention"):
        zoo.AttentionDistillationLoss()(make("test_vit", img_size=64), images())
