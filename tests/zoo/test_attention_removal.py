"""Attention that fades out of blocks, and is gone; which blocks it is taken from."""
import copy
import io
import math
from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock
from torch import nn

import zoo
from zoo.attention_removal import diluted_blocks
from zoo.changes import change, finish
from zoo.errors import InputError
from zoo.layers.attention_removal import DilutedBlock, NoAttention

VIT = partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=3)
SMALL = dict(img_size=32, depth=2, num_classes=3)
BUILT = {
    "vit": VIT,
    "layer scale, masks and drop path": partial(VIT, init_values=0.5, drop_path_rate=0.2, drop_rate=0.1),
    "norms after": partial(VIT, block_fn=ResPostBlock),
    "deit": partial(timm.create_model, "deit_nano_patch16_224_cb", num_classes=3),
    "eva": partial(timm.create_model, "eva02_tiny_patch14_224", **dict(SMALL, img_size=28), init_values=0.5),
    "eva, norms after": partial(timm.create_model, "eva_giant_patch14_224", **dict(SMALL, img_size=28), embed_dim=48, num_heads=2,
                                mlp_ratio=2.0, use_post_norm=True),
    "beit": partial(timm.create_model, "beit_base_patch16_224", **SMALL, embed_dim=48, num_heads=2),
    "beit without scales": partial(timm.create_model, "beit_base_patch16_224", **SMALL, embed_dim=48, num_heads=2, init_values=None),
    "relative positions": partial(timm.create_model, "vit_relpos_small_patch16_224", **SMALL),
    "relative positions, norms after": partial(timm.create_model, "vit_srelpos_small_patch16_224", **SMALL),
    "naflex": partial(timm.create_model, "naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=2, num_classes=3),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILT[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    size = 28 if "Eva" in type(model).__name__ else 32
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def branches(model: nn.Module, x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, nn.Module]:
    """What comes into a block, what its attention's branch and the MLP's put out, and the block."""
    seen: dict[str, torch.Tensor] = {}
    module = model.blocks[block]
    hooks = [module.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0])),
             module.drop_path1.register_forward_hook(lambda module, inputs, out: seen.update(attention=out)),
             module.register_forward_hook(lambda module, inputs, out: seen.update(out=out))]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen["x"], seen["attention"], seen["out"], module


@pytest.mark.parametrize("name", BUILT)
def test_from_all_of_the_attention_to_none(name):
    """λ = 1 changes no bit; λ is the formula; 0, with and without the parameters, is x ← 2x."""
    model = made(name)
    x, names = image(model), list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        zoo.remove_attention(model, [1], share=1.0)
        assert torch.equal(model(x), expected)
        assert [name for name in model.state_dict() if name not in names] == ["blocks.1.attention_share"]
        zoo.remove_attention(model, [1], share=0.25)
        before, attention, out, block = branches(model, x, 1)
        y = 1.75 * before + 0.25 * attention
        post = hasattr(block, "norm2") and "PostNorm" in type(block).__name__
        gamma = getattr(block, "gamma_2", None)
        mlp = block.norm2(block.mlp(y)) if post else block.mlp(block.norm2(y))
        mlp = block.ls2(mlp) if hasattr(block, "ls2") else mlp if gamma is None else gamma * mlp
        torch.testing.assert_close(out, y + mlp)
        assert not torch.allclose(model(x), expected, rtol=1e-3)
        zoo.remove_attention(model, [1], share=0.0)
        none = model(x)
        zoo.remove_attention(model, [1])
        assert torch.equal(model(x), none)
    kept = [name for name in names if not name.startswith(("blocks.1.norm1.", "blocks.1.attn.", "blocks.1.ls1.", "blocks.1.gamma_1"))]
    assert list(model.state_dict()) == kept
    assert type(model.blocks[1]) is type(made(name).blocks[1])
    direct = zoo.remove_attention(made(name), [1])
    with torch.no_grad():
        assert torch.equal(direct(x), none)


def test_removed_attention_learns_nothing_and_has_gradients_of_zeros():
    model = made("vit").train()
    parameters = {name: parameter for name, parameter in model.named_parameters() if ".attn." in name or ".norm1." in name}
    zoo.remove_attention(model, [0, 2], share=0.0)
    model(image(model)).square().sum().backward()
    for name, parameter in parameters.items():
        assert parameter is model.get_parameter(name)
        assert bool(parameter.grad.any()) == name.startswith("blocks.1."), name


def test_drop_path_is_of_the_branch():
    """Of an image whose branch is dropped, (2 − λ) x is left."""
    model = zoo.remove_attention(nn.Sequential(Block(8, 2, drop_path=0.5)), [0], share=0.25).train()
    nn.init.zeros_(model[0].mlp.fc2.weight)
    x = torch.randn(64, 3, 8)
    torch.manual_seed(0)
    dropped = torch.isclose(model(x), 1.75 * x).all(-1).all(-1)
    assert 10 < dropped.sum() < 54


def test_the_share_of_an_epoch():
    shares = [zoo.attention_share(epoch, 5) for epoch in range(7)]
    assert shares == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert zoo.attention_share(120, 300) == 1 - 120 / 299


def test_a_plain_loop_ends_without_the_parameters():
    """The optimizer goes on through all of it, and what is left learns."""
    model, blocks = made("vit").train(), [0, 1]
    zoo.remove_attention(model, blocks, share=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = model.blocks[0].mlp.fc1.weight.clone()
    for epoch in range(4):
        zoo.remove_attention(model, blocks, share=zoo.attention_share(epoch, epochs=3))
        optimizer.zero_grad()
        model(image(model)).square().sum().backward()
        optimizer.step()
    count, out = sum(p.numel() for p in model.parameters()), model.eval()(image(model))
    assert diluted_blocks(model) == {0: 0.0, 1: 0.0} and not torch.equal(model.blocks[0].mlp.fc1.weight, before)
    assert finish(model, []) == [{"type": "remove_attention", "blocks": [0, 1]}]
    assert torch.equal(model(image(model)), out)
    assert count - sum(p.numel() for p in model.parameters()) == 2 * (4 * 24 * 24 + 4 * 24 + 2 * 24)


@pytest.mark.parametrize("share", [0.5, None])
def test_saved_loaded_copied_compiled_and_exported(share, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'zoo-attention[export]'")
    model = zoo.remove_attention(made("vit"), [0, 2], share=share)
    x = image(model, 1)
    expected = model(x).detach()
    other = zoo.remove_attention(VIT().eval(), [0, 2], share=share and 1.0)
    other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    file.seek(0)
    for again in (other, torch.load(file, weights_only=False), torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(again(x), expected)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    softmaxes = sum(node.target is torch.ops.aten.scaled_dot_product_attention.default for node in program.graph.nodes)
    assert softmaxes == (1 if share is None else 3)


def test_one_compiled_graph_serves_every_share():
    model, compiled = zoo.remove_attention(made("vit"), [0], share=1.0), 0

    def backend(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph

    run = torch.compile(model, fullgraph=True, backend=backend)
    for share in (1.0, 0.7, 0.2, 0.0):
        zoo.remove_attention(model, [0], share=share)
        torch.testing.assert_close(run(image(model)), model(image(model)))
    assert compiled == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    model = zoo.remove_attention(made("vit"), [0], share=0.5)
    with torch.autocast("cpu", dtype):
        assert model(image(model)).dtype == dtype
    expected = model(image(model))
    out = model.to(dtype)(image(model).to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = zoo.remove_attention(made("eva"), [0], share=0.5).train()
        model.set_grad_checkpointing(checkpointing)
        grads.append(torch.autograd.grad(model(image(model)).square().sum(), model.parameters()))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["beit", "relative positions", "vit"])
def test_images_may_change_their_size(name):
    model = zoo.remove_attention(made(name), [0])
    model.set_input_size((48, 48))
    assert model(torch.randn(1, 3, 48, 48)).isfinite().all()


def test_mechanisms_may_be_replaced_before_and_after():
    model = zoo.remove_attention(zoo.replace_attention(made("vit"), "entmax15"), [0, 1], share=0.5)
    zoo.replace_attention(model, "cog", where="blocks.1")
    zoo.remove_attention(model, [0])
    assert model(image(model)).isfinite().all() and isinstance(model.blocks[1], DilutedBlock)


@pytest.mark.parametrize(("build", "arguments", "said"), [
    (VIT, ([3],), "blocks of VisionTransformer are 0 to 2, got 3"),
    (VIT, ([0, -1],), "blocks of VisionTransformer are 0 to 2, got -1"),
    (VIT, (["blocks.0"],), "blocks of VisionTransformer are 0 to 2, got blocks.0"),
    (VIT, (1,), r"blocks must be several numbers of blocks, such as \[1\], got 1"),
    (VIT, ([0, None],), "blocks of VisionTransformer are 0 to 2, got None"),
    (VIT, ([0], 1.5), r"share must be in \[0, 1\], or None to remove attention, got 1.5"),
    (VIT, ([0], math.nan), r"share must be in \[0, 1\], or None to remove attention, got nan"),
    (lambda: zoo.remove_attention(VIT(), [1]), ([0, 1], 0.5), "a share of attention was asked for in block 1, where"),
    (partial(timm.create_model, "resnet18"), ([0],), "ResNet has no block whose attention could be removed; timm's vision_"),
    (partial(VIT, block_fn=ParallelScalingBlock), ([0],), "VisionTransformer has no block whose attention could be removed"),
])
def test_what_cannot_be_done_is_refused_and_left(build, arguments, said):
    model = build()
    names = list(model.state_dict())
    with pytest.raises(InputError, match=said):
        zoo.remove_attention(model, *arguments)
    assert list(model.state_dict()) == names and not diluted_blocks(model)


def test_a_block_that_somebody_made_run_otherwise_is_none():
    model = VIT()
    model.blocks[0].forward = lambda x, **kwargs: x
    zoo.remove_attention(model, [0])
    assert isinstance(model.blocks[1].attn, NoAttention) and not isinstance(model.blocks[0].attn, NoAttention)


@pytest.mark.parametrize(("epoch", "epochs"), [(0, 1), (-1, 5)])
def test_shares_of_no_epoch(epoch, epochs):
    with pytest.raises(InputError, match=f"at least 2 epochs, which are counted from 0; got epoch {epoch} of {epochs}"):
        zoo.attention_share(epoch, epochs)


def entropy(logits: torch.Tensor) -> float:
    return logits.double().std(0).log2().sum().item()


def test_transfer_entropies_are_of_the_definition_and_the_least_is_chosen():
    model = made("vit").train()
    x = image(model, 10)
    batches = [(part, None) for part in x.split([4, 1, 5])]
    chosen = zoo.choose_blocks(model, batches, count=2)
    assert model.training and not any(module._forward_hooks for module in model.modules())

    def logits(*skipped: int) -> torch.Tensor:
        other = copy.deepcopy(model).eval()
        for place in skipped:
            block = other.blocks[place]
            block.forward = lambda y, block=block, **kwargs: y + block.mlp(block.norm2(y))
        with torch.no_grad():
            return other(x)

    whole, first, second = entropy(logits()), chosen[0], chosen[1]
    for place, found in first.entropies.items():
        assert found == pytest.approx(abs(whole - entropy(logits(place))), rel=1e-4)
    for place, found in second.entropies.items():
        assert found == pytest.approx(abs(whole - entropy(logits(first.block, place))), rel=1e-4)
    assert list(first.entropies) == [0, 1, 2] and sorted([first.block, *second.entropies]) == [0, 1, 2]
    assert all(choice.entropies[choice.block] == min(choice.entropies.values()) for choice in chosen)


def test_blocks_without_attention_are_no_choice():
    model = zoo.remove_attention(zoo.remove_attention(made("vit"), [0]), [1], share=0.5)
    choice, = zoo.choose_blocks(model, [(image(model), None)], count=1)
    assert list(choice.entropies) == [choice.block] == [2]


@pytest.mark.parametrize(("batches", "count", "said"), [
    ([(torch.ones(2, 3, 32, 32), 0)], 4, "has 3 blocks with all of their attention, of which 4 were to be chosen"),
    ([(torch.ones(2, 3, 32, 32), 0)], 0, "of which 0 were to be chosen"),
    ([(torch.ones(1, 3, 32, 32), 0)], 1, "over images, and 1 came"),
    ([(torch.full((2, 3, 32, 32), math.nan), 0)], 1, "the same for all images, or not finite"),
    (iter([(torch.randn(2, 3, 32, 32), 0)]), 2, "and 0 came; batches are gone through once per block"),
])
def test_choices_that_cannot_be_made(batches, count, said):
    with pytest.raises(InputError, match=said):
        zoo.choose_blocks(VIT(), batches, count)


def test_logits_that_do_not_differ_have_no_entropy():
    model = VIT()
    nn.init.zeros_(model.head.weight[1])
    with pytest.raises(InputError, match="the logits of a class are the same for all images, or not finite"):
        zoo.choose_blocks(model, [(torch.randn(2, 3, 32, 32), 0)], 1)


def test_networks_without_logits_have_no_entropy():
    with pytest.raises(InputError, match=r"the entropy is of logits \(B, classes\), and VisionTransformer gives \(2, 5, 24\)"):
        zoo.choose_blocks(VIT(num_classes=0, global_pool=""), [(torch.ones(2, 3, 32, 32), 0)], 1)


def test_changes_are_made_one_after_the_other():
    model = made("vit")
    change(model, [{"type": "prune_heads", "heads": {"blocks.2.attn": [1]}}, {"type": "remove_attention", "blocks": [0]},
                   {"type": "replace_attention", "layer": "cog", "where": "blocks.1"}])
    none, replaced, pruned = (block.attn for block in model.blocks)
    assert isinstance(none, NoAttention) and hasattr(replaced, "mechanism") and pruned.num_heads == 1


@pytest.mark.parametrize(("described", "said"), [
    ({"type": "remove_atention", "blocks": [0]}, "there is no change 'remove_atention'; did you mean remove_attention"),
    ({"blocks": [0]}, "there is no change None; changes are prune_heads, regroup_heads, remove_attention, replace_attention"),
    ({"type": "remove_attention", "block": [0]}, "remove_attention cannot be done with {'block': \\[0\\]}"),
])
def test_changes_that_there_are_not(described, said):
    with pytest.raises(InputError, match=said):
        change(VIT(), [described])
