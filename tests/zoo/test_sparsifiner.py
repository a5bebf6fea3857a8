"""Sparsifiner in built vision transformers: which keys are chosen, at every size, and how the choice is learned."""
import copy
import io
import math

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.layers import SparsifinerAttention
from zoo.layers.sparsifiner import Grid, _largest

NETWORKS = {  # with tokens before the patches, relative positions, rotary embeddings
    "vit": ("vit_tiny_patch16_224", dict(img_size=64, depth=2, embed_dim=48, class_token=True)),
    "registers": ("vit_tiny_patch16_224", dict(img_size=64, depth=2, embed_dim=48, reg_tokens=3)),
    "no class token": ("vit_tiny_patch16_224", dict(img_size=64, depth=2, embed_dim=48, class_token=False, global_pool="avg")),
    "beit": ("beit_base_patch16_224", dict(img_size=64, depth=2, embed_dim=48, num_heads=3)),
    "relpos": ("vit_relpos_small_patch16_224", dict(img_size=64, depth=2, embed_dim=48, num_heads=3)),
    "eva02": ("eva02_tiny_patch14_224", dict(img_size=56, depth=2, embed_dim=48)),
}


def plain(kind="vit", **args) -> nn.Module:
    """With attention that is far from uniform."""
    torch.manual_seed(0)
    name, fixed = NETWORKS[kind]
    model = timm.create_model(name, num_classes=5, **{**fixed, **args}).eval()
    for path, parameter in model.named_parameters():
        if "qkv" in path or "q_proj" in path or "k_proj" in path:
            parameter.data.mul_(3)
        elif path == "head.weight":
            nn.init.normal_(parameter, std=0.3)
    return model


def make(kind="vit", keep=0.25, **args) -> nn.Module:
    """With a predictor whose choices differ from key to key."""
    model = zoo.replace_attention(plain(kind, **args), "sparsifiner", keep=keep)
    for path, parameter in model.named_parameters():
        if ".mechanism." in path:
            nn.init.normal_(parameter, std=0.5)
    return model


def images(size=(64, 64), batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def mechanisms(model) -> list[SparsifinerAttention]:
    return [module for module in model.modules() if isinstance(module, SparsifinerAttention)]


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_attends_to_its_share_of_keys_and_is_saved(kind):
    model, x = make(kind), images((NETWORKS[kind][1]["img_size"],) * 2)
    with torch.no_grad(), zoo.capture(model) as maps:
        out = model(x)
    prefix = model.num_prefix_tokens
    for seen in (maps[name] for name in maps if name.endswith(".mechanism")):
        mask, attention = seen["mask"], seen["attention"]
        assert mask.shape[-1] == prefix + 16 and mask[..., :prefix, :].all()
        assert (mask[..., prefix:, :].sum(-1) == math.ceil(0.25 * mask.shape[-1])).all()
        assert not attention[~mask].any() and (attention[mask] > 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
        assert len({tuple(row.tolist()) for row in mask[..., prefix:, :].flatten(0, -2)}) > 2  # rows differ
    other = zoo.replace_attention(plain(kind), "sparsifiner")
    other.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        for again in (other, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(again(x), out)


@pytest.mark.parametrize("kind", NETWORKS)
def test_with_all_keys_it_is_softmax_attention(kind):
    x = images((NETWORKS[kind][1]["img_size"],) * 2)
    torch.testing.assert_close(make(kind, keep=1)(x), plain(kind)(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_the_formula(threshold):
    """Key by key and query by query."""
    torch.manual_seed(0)
    layer = SparsifinerAttention(2, 8, (3, 4), threshold=threshold, num_basis=5, keep_coefficients=2, basis_threshold=0.1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    q, k, v = torch.randn(3, 2, 2, 13, 8)
    with torch.no_grad(), zoo.capture(layer) as maps:
        out = layer(q, k, v)
    u = layer.proj_back_n.abs() * (layer.proj_back_n.abs() > 0.1)
    empty = 0
    for b in range(2):
        for h in range(2):
            into = layer.proj_c_k(k[b, h]).T @ layer.proj_n
            for i in range(13):
                keys = list(range(13))
                if i:
                    c = (layer.proj_c_q(q[b, h, i]) @ into / math.sqrt(2)).softmax(0)
                    kept = sorted(range(5), key=lambda r: -c[r])[:2]
                    score = sum(c[r] * u[:, r] for r in kept)
                    best = sorted(range(13), key=lambda j: (-score[j], j))[: math.ceil(0.25 * 13)]
                    keys = sorted(best) if threshold is None else [j for j in range(13) if score[j] > threshold]
                assert maps[""]["mask"][b, h, i].nonzero().flatten().tolist() == keys
                empty += not keys
                weights = (k[b, h, keys] @ q[b, h, i] / math.sqrt(8)).softmax(0)
                torch.testing.assert_close(out[b, h, i], weights @ v[b, h, keys], atol=1e-6, rtol=1e-4)
    assert threshold is None or empty  # whose outputs are 0


def test_ties_go_to_the_first():
    x = torch.tensor([[0.0, 2, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 3, 3, 3, 0]])
    assert _largest(x, 3).int().tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert _largest(x, 2).int().tolist() == [[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_queries_without_a_key_put_out_zero_and_have_gradients():
    layer = SparsifinerAttention(2, 8, (2, 3), threshold=9.0)
    q, k, v = torch.randn(3, 1, 2, 7, 8).requires_grad_()
    for fused in (True, False):
        layer.fused_attn = fused
        out = layer(q, k, v)
        assert not out[..., 1:, :].any() and out[..., 0, :].all()
        gradient, = torch.autograd.grad(out.square().sum(), v)
        assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_what_is_not_a_number_stays_none(threshold):
    layer = SparsifinerAttention(2, 8, (2, 3), threshold=threshold)
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    q[0, 1, 4] = torch.nan
    for fused in (True, False):
        layer.fused_attn = fused
        found = layer(q, k, v).isnan().any(-1)
        assert found[0, 1, 4] and found.sum() == 1


def test_masked_keys_are_in_no_mask_and_no_sum():
    model = make()
    attn, x = model.blocks[0].attn, torch.randn(2, 17, 48)
    keys = torch.arange(17) % 3 != 1
    other = torch.where(keys[:, None], x, torch.randn(2, 17, 48))
    for mask in (keys.view(1, 1, 1, 17), keys.expand(2, 1, 17, 17), torch.where(keys, 0.0, torch.finfo(x.dtype).min)):
        with zoo.capture(attn) as maps:
            out = attn(x, attn_mask=mask)
        chosen = maps["mechanism"]["mask"]
        assert not chosen[..., ~keys].any() and (chosen[..., 1:, :].sum(-1) == 5).all() and (chosen[..., 0, :] == keys).all()
        torch.testing.assert_close(attn(other, attn_mask=mask)[:, keys], out[:, keys])


def test_fused_or_spelled_out_gradients_are_the_same_and_none_is_the_predictors():
    model, x = make("beit"), images()
    found = []
    for fused in (True, False):
        for mechanism in mechanisms(model):
            mechanism.fused_attn = fused
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        found.append((out, [p.grad for name, p in model.named_parameters() if ".mechanism." not in name]))
        assert all(p.grad is None for name, p in model.named_parameters() if ".mechanism." in name)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_any_size_and_the_map_is_the_models():
    model = make(dynamic_img_size=True, dynamic_img_pad=True)
    height, width = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    for name, parameter in model.named_parameters():  # a basis that says where a patch is: the lower the more, and then the more left
        if name.endswith(("proj_n", "proj_back_n")):
            parameter.data[0], parameter.data[1:] = 0, (height + 1 - 0.01 * width).reshape(-1, 1)
    for size, grid in (((64, 64), (4, 4)), ((128, 32), (8, 2)), ((32, 128), (2, 8)), ((90, 64), (6, 4))):
        with torch.no_grad(), zoo.capture(model) as maps:
            assert model(images(size)).isfinite().all()
        mask = maps["blocks.1.attn.mechanism"]["mask"]
        count, patches = math.ceil(0.25 * (1 + grid[0] * grid[1])), torch.arange(grid[0] * grid[1])
        lowest = patches.view(grid).flip(0)  # rows from below
        expected = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        expected[lowest.flatten()[:count]] = True
        assert (mask[..., 1:, 1:] == expected).all() and not mask[..., 1:, 0].any()
    layer = mechanisms(model)[0]
    torch.testing.assert_close(layer._resized(layer.proj_n, 25).sum(), layer.proj_n.sum(), rtol=0.02, atol=0)  # of more patches


def test_maps_that_are_resized_keep_what_is_before_the_patches():
    layer = SparsifinerAttention(2, 8, (2, 3), num_prefix_tokens=2)
    layer.grid = Grid()
    layer.grid.size = (4, 3)
    found = layer._resized(layer.proj_n, 14)
    assert found.shape == (14, 1) and torch.equal(found[:2], layer.proj_n[:2])


def test_set_input_size_and_layers_that_are_taken_out():
    model = make()
    model.set_input_size(img_size=(96, 48))
    assert model(images((96, 48))).isfinite().all()
    with zoo.capture(model.blocks[0].attn) as maps:
        model.blocks[0].attn(torch.randn(1, 19, 48))
    assert maps["mechanism"]["mask"].shape == (1, 3, 19, 19)
    with pytest.raises(ValueError, match=r"23 tokens are not 1 and a map of 6×3 patches, for which the SparsifinerAttention is"):
        model.blocks[0].attn(torch.randn(1, 23, 48))


def test_one_hook_is_enough_and_copies_do_not_share_it():
    model = zoo.replace_attention(make(dynamic_img_size=True), "sparsifiner", where="blocks.1")
    grids = [hook for hook in model.patch_embed._forward_hooks.values() if isinstance(hook, Grid)]
    assert len(grids) == 1 and {mechanism.grid for mechanism in mechanisms(model)} == set(grids)
    other = copy.deepcopy(model)
    model(images((32, 64)))
    other(images((64, 32)))
    assert mechanisms(model)[0].grid.size == (2, 4) and mechanisms(other)[1].grid.size == (4, 2)


def test_windows_of_a_size_that_is_given():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 4))
    before = repr(swin)
    with pytest.raises(InputError, match="SwinTransformer has no patch_embed that tells its map of patches: grid_size has to be given"):
        zoo.replace_attention(swin, "sparsifiner")
    assert repr(swin) == before
    zoo.replace_attention(swin.eval(), "sparsifiner", grid_size=(4, 4), num_prefix_tokens=0)
    with torch.no_grad(), zoo.capture(swin) as maps:
        swin(images((32, 32)))
    shifted = maps["layers.0.blocks.1.attn.mechanism"]["mask"].unflatten(0, (2, -1))
    apart = swin.layers[0].blocks[1].attn_mask != 0
    assert (maps["layers.0.blocks.0.attn.mechanism"]["mask"].sum(-1) == 4).all()
    assert apart.any() and not shifted[apart[:, None].expand_as(shifted[0]).expand_as(shifted)].any()


@pytest.mark.parametrize("kind", ["vit", "eva02", "beit"])
def test_compiles_whole_and_exports_for_any_batch(kind):
    model, x = make(kind), images((NETWORKS[kind][1]["img_size"],) * 2)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        torch.testing.assert_close(program.module()(x[:1]), expected[:1], atol=1e-5, rtol=1e-4)


def test_compiled_for_several_sizes():
    model = make(dynamic_img_size=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in ((64, 64), (32, 96), (96, 32), (64, 64)):
            torch.testing.assert_close(compiled(images(size)), model(images(size)))


def test_onnx_runtime_computes_the_same_also_at_ties(tmp_path):
    model, x = make(), images()
    for mechanism in mechanisms(model):  # most numbers of the basis are 0, so that keys are equal
        mechanism.basis_threshold = 1.0
    with torch.no_grad(), zoo.capture(model) as maps:
        expected = model(x)
    approximation = maps["blocks.0.attn.mechanism"]["approximation"]
    assert ((approximation == 0).sum(-1) > 17 - 5).any()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False, input_names=["x"],
                      dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, answer in ((x, expected), (x[:1], expected[:1])):
        found, = session.run(None, {"x": batch.numpy()})
        np.testing.assert_allclose(found, answer, atol=2e-5, rtol=1e-4)


def test_lower_precision_chooses_the_same_keys():
    model, x = make(), images()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, atol=0.3, rtol=0.3)
    low = make().to(torch.bfloat16)
    assert low(x.bfloat16()).isfinite().all()
    layer = SparsifinerAttention(3, 16, (4, 4))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer, q, k = layer.bfloat16(), *torch.randn(2, 2, 3, 17, 16).bfloat16()
    chosen = layer.mask(q, k)
    assert torch.equal(chosen, layer.float().mask(q.float(), k.float()))  # the same numbers, computed with in float32


def test_reconstruction_reaches_the_predictors_alone_and_the_network_runs_with_all_keys():
    model, x, teacher = make("relpos"), images(), plain("relpos")
    loss = zoo.SparsifinerReconstructionLoss()(model, x)
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".mechanism." in name}
    inputs = []
    for block in teacher.blocks:
        block.attn.register_forward_pre_hook(lambda attn, args: inputs.append(args[0]))
    teacher(x)
    expected = 0
    for block, tokens in zip(model.blocks, inputs, strict=True):
        attn, layer = block.attn, block.attn.mechanism
        q, k, _ = attn._heads(tokens)
        attention = (q @ k.mT * attn.scale + attn.rel_pos.get_bias()).softmax(-1)
        coefficients = (layer.proj_c_q(q) @ (layer.proj_c_k(k).mT @ layer.proj_n) / math.sqrt(3)).softmax(-1)
        expected += 0.01 / 2 * (coefficients @ layer.proj_back_n.T - attention).square().sum()
    torch.testing.assert_close(loss, expected)
    assert not any(module._forward_hooks for module in mechanisms(model))
    with pytest.raises(InputError, match="VisionTransformer has no Sparsifiner attention to train; zoo.replace_attention"):
        zoo.SparsifinerReconstructionLoss()(plain(), x)


def test_distillation_of_logits_and_tokens():
    teacher, model, x, labels = plain(), make(), images(), torch.tensor([1, 3])
    distillation = zoo.TokenDistillationLoss(teacher)
    loss = distillation(model, x, labels)
    ours, theirs = (network.forward_features(x) for network in (model, teacher))
    logits, expected = (network.forward_head(tokens) for network, tokens in ((model, ours), (teacher, theirs)))
    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    by_hand = F.cross_entropy(logits, labels) + 0.5 * divergence + 0.5 * (ours - theirs)[:, 1:].square().mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert not list(distillation.parameters()) and all(parameter.grad is None for parameter in teacher.parameters())
    torch.testing.assert_close(distillation(teacher, x, labels), F.cross_entropy(teacher(x), labels))
    with pytest.raises(InputError, match=r"logits of VisionTransformer are of shape \(2, 7\), the teacher's of \(2, 5\)"):
        distillation(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_classes=7), x, labels)
    with pytest.raises(InputError, match="the teacher has to have timm's forward_features and forward_head, and Linear has not"):
        zoo.TokenDistillationLoss(nn.Linear(2, 2))


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(keep=0.0), "keep is a share of the keys, above 0 and up to 1, got 0.0"),
    (dict(keep=1.5), "keep is a share of the keys, above 0 and up to 1, got 1.5"),
    (dict(threshold=-0.1), "threshold must be at least 0, got -0.1"),
    (dict(basis_threshold=math.nan), "basis_threshold must be at least 0, got nan"),
    (dict(num_basis=0), "num_basis must be at least 1, got 0"),
    (dict(grid_size=(0, 4)), r"grid_size must be at least 1, got \(0, 4\)"),
    (dict(num_prefix_tokens=-1), "num_prefix_tokens must be at least 0, got -1"),
    (dict(share=0.2), "unexpected keyword argument 'share'"),
])
def test_wrong_arguments_are_named_and_leave_the_model_as_it_was(arguments, message):
    model = plain()
    before = repr(model)
    with pytest.raises(InputError, match=f"no attention for blocks.0.attn can be made: .*{message}"):
        zoo.replace_attention(model, "sparsifiner", **arguments)
    assert repr(model) == before and not model.patch_embed._forward_hooks
