"""Attention in built vision transformers is replaced, and everything around it stays."""
import copy
import io
import re
from functools import partial

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.layers import Attention, set_fused_attn
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.layers import HedgehogAttention, NormalizedAttention
from zoo.layers.normalized_attention import NORMALIZERS

KINDS = {  # with what they differ in: a class token, rotary embeddings, biases apart, relative positions, windows, norms
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, depth=2, embed_dim=48)),
    "qk norm": ("test_vit3", dict(img_size=32, qk_norm=True, scale_attn_norm=True)),
    "eva02": ("eva02_tiny_patch14_224", dict(img_size=28, depth=2, embed_dim=48)),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", dict(img_size=32, depth=2, embed_dim=96, num_heads=3)),
    "grouped": ("vit_small_patch16_dinov3", dict(img_size=32, depth=2, embed_dim=96, num_heads=4, num_kv_heads=2, attn_type="rope",
                                                 qkv_fused=False)),
    "beit": ("beit_base_patch16_224", dict(img_size=32, depth=1, embed_dim=48, num_heads=3)),
    "relpos": ("vit_relpos_small_patch16_224", dict(img_size=32, depth=1, embed_dim=48, num_heads=3)),
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 4))),
}
BIASED = ("beit", "relpos", "swin")
LAYERS = (*NORMALIZERS, "hedgehog", "moh", "pyramid_sparse")
EXACT = ("softmax", "pyramid_sparse")  # of rows that one block holds


def make(kind="vit", **args) -> nn.Module:
    """With attention that is far from uniform, and no branch that is nearly closed."""
    torch.manual_seed(0)
    name, fixed = KINDS[kind]
    model = timm.create_model(name, num_classes=5, **{**fixed, **args}).eval()
    for path, parameter in model.named_parameters():
        if "qkv" in path or re.search("[qk]_proj", path):
            parameter.data.mul_(3)
        elif "relative_position_bias_table" in path or "rel_pos" in path:
            nn.init.normal_(parameter)
        elif "gamma" in path:
            nn.init.constant_(parameter, 0.5)
        elif re.search(r"^head\.(fc\.)?weight", path):
            nn.init.normal_(parameter, std=0.3)
    return model


def images(kind="vit", batch=2):
    side = KINDS[kind][1]["img_size"]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def mechanisms(model):
    return {name: module for name, module in model.named_modules() if name.endswith(".mechanism")}


@pytest.mark.parametrize("gate", [None, "head", "element"])
@pytest.mark.parametrize("kind", KINDS)
def test_softmax_and_gates_keep_the_outputs_and_all_that_was_there(kind, gate):
    model, x = make(kind), images(kind)
    before, parameters, state = model(x), dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    frozen = next(iter(parameters.values())).requires_grad_(False)
    assert zoo.replace_attention(model, "softmax", gate=gate) is model
    torch.testing.assert_close(model(x), before, atol=2e-6, rtol=1e-5)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items()) and not frozen.requires_grad
    new = set(now) - set(parameters)
    assert all(re.search(r"attn\.gate\.(weight|bias)$", name) for name in new) and bool(new) == bool(gate)
    found = model.load_state_dict(state, strict=False)
    assert set(found.missing_keys) == new and not found.unexpected_keys
    assert len(mechanisms(model)) == sum(isinstance(m, NormalizedAttention) for m in model.modules()) > 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mechanism_in_every_kind_learns_and_is_saved(kind, layer):
    model, x = make(kind).train(), images(kind)
    before = model.eval()(x)
    model.train()
    if layer in ("hedgehog", "pyramid_sparse") and kind in BIASED:
        old = repr(model)
        with pytest.raises(InputError, match=r"(Hedgehog|PyramidSparse)Attention does not fit \S+attn, \w+, which adds relative positions"):
            zoo.replace_attention(model, layer)
        assert repr(model) == old
        return
    zoo.replace_attention(model, layer, gate="head")
    assert model.training and all(module.training for module in model.modules())
    out = model(x)
    out.square().sum().backward()
    new = {name: parameter for name, parameter in model.named_parameters() if ".mechanism." in name or ".gate." in name}
    alone = {name for name, parameter in new.items() if name.endswith("router.routed.weight") and len(parameter) == 1}  # always picked
    assert all(parameter.grad is not None and (parameter.grad.any() or name in alone) for name, parameter in new.items()), new.keys()
    model.eval()
    assert torch.allclose(model(x), before, atol=1e-5) == (layer in EXACT)
    other = zoo.replace_attention(make(kind), layer, gate="head")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for again in (other, copy.deepcopy(model)):
            assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_formula(layer):
    """From the queries, keys and values that timm's own projections make."""
    model, x = make(depth=1), torch.randn(2, 7, 48)
    attn = zoo.replace_attention(model, layer).blocks[0].attn
    for parameter in attn.mechanism.parameters():
        nn.init.normal_(parameter, std=0.3)
    q, k, v = attn.qkv(x).reshape(2, 7, 3, 3, 16).permute(2, 0, 3, 1, 4)
    z = q @ k.mT / 4
    with torch.no_grad(), zoo.capture(model) as maps:
        out = attn(x)
    found = maps["blocks.0.attn.mechanism"]["attention"]
    if layer == "hedgehog":
        features = [torch.cat([(y @ w).softmax(-1), (-(y @ w)).softmax(-1)], -1) for y, w in (
            (q, attn.mechanism.feature_map_q.layer), (k, attn.mechanism.feature_map_k.layer))]
        expected = features[0] @ features[1].mT
        expected = expected / expected.sum(-1, keepdim=True)
    elif "entmax" in layer or layer == "sparsemax":
        alpha = {"entmax15": 1.5, "sparsemax": 2.0}.get(layer) or 1 + attn.mechanism.alpha.sigmoid()[:, None, None]
        kept = found > 0  # the condition of optimality: (α-1) z - p^(α-1) is one threshold where p > 0, and no more elsewhere
        slack = (alpha - 1) * z - found.clamp_min(0) ** (alpha - 1)
        threshold = slack.masked_fill(~kept, -torch.inf).amax(-1, keepdim=True)
        torch.testing.assert_close(slack.masked_fill(~kept, 0), threshold.expand_as(slack).masked_fill(~kept, 0), atol=1e-4, rtol=1e-4)
        assert ((alpha - 1) * z <= threshold + 1e-4)[~kept].all()
        expected = found / found.sum(-1, keepdim=True)
    else:
        expected = {"cog": z.sign() * z.abs().softmax(-1), "rela": z.relu()}.get(layer, z.softmax(-1))
    torch.testing.assert_close(found, expected)
    o = (expected @ v).transpose(1, 2).flatten(2)
    if layer == "rela":
        scale, gate = attn.mechanism.scale, attn.mechanism.gate
        o = scale * o / (o.square().mean(-1, keepdim=True) + 1e-8).sqrt() * (gate * o).sigmoid()
    if layer == "moh":
        o = (o.unflatten(2, (3, 16)) * attn.mechanism.router(x)[..., None]).flatten(2)
    torch.testing.assert_close(out, attn.proj(o))


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "pyramid_sparse"])  # which refuses masks
def test_a_masked_key_is_as_if_it_were_not_there(layer):
    attn, x = zoo.replace_attention(make(), layer).blocks[0].attn, torch.randn(2, 9, 48)
    expected = attn(x[:, :6])
    keys = torch.arange(9) < 6
    least = torch.where(keys, 0.0, torch.finfo(x.dtype).min)
    for mask in (keys, torch.where(keys, 0.0, -torch.inf), least):
        mask = mask.view(1, 1, 1, 9)
        if layer != "hedgehog":  # which takes masks of keys only
            mask = mask.expand(2, 1, 9, 9)
        torch.testing.assert_close(attn(x, attn_mask=mask)[:, :6], expected, atol=1e-5, rtol=1e-4)
    if layer == "hedgehog":
        with pytest.raises(ValueError, match=r"takes masks of keys, \(…, 1, 9\), not one that differs between queries"):
            attn(x, is_causal=True)
    else:
        torch.testing.assert_close(attn(x, is_causal=True)[:, :4], attn(x[:, :4], is_causal=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", ["cog", "rela", "entmax15"])
def test_shifted_windows_stay_apart(layer):
    model = zoo.replace_attention(make("swin"), layer)
    block = model.layers[0].blocks[1]
    with torch.no_grad(), zoo.capture(model) as maps:
        model(images("swin"))
    attention = maps["layers.0.blocks.1.attn.mechanism"]["attention"].unflatten(0, (2, -1))
    apart = block.attn_mask != 0
    assert apart.any() and not attention[:, apart[:, None].expand_as(attention[0])].any()


@pytest.mark.parametrize("kind", ["vit", "eva02"])
@pytest.mark.parametrize("layer", ["entmax15", "entmax", "cog", "rela", "hedgehog", "moh", "pyramid_sparse"])
def test_compiles_whole_and_exports_for_any_batch(kind, layer):
    model, x = zoo.replace_attention(make(kind), layer, gate="element"), images(kind)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        torch.testing.assert_close(program.module()(x[:1]), expected[:1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_onnx_runtime_computes_the_same(layer, tmp_path):
    model, x = zoo.replace_attention(make(depth=1), layer, gate="head"), images()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False, input_names=["x"],
                      dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (x, x[:1]):
        found, = session.run(None, {"x": batch.numpy()})
        np.testing.assert_allclose(found, model(batch).detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_timms_ways_of_running_a_model(layer):
    model, x = zoo.replace_attention(make(), layer), images()
    expected = model(x)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert len(features) == 2 and all(feature.isfinite().all() for feature in features)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    out = model.train()(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.eval()(x).float(), expected, atol=0.2, rtol=0.2)
    low = zoo.replace_attention(make().to(torch.bfloat16), layer, gate="head")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert low(x.bfloat16()).isfinite().all()
    backbone = zoo.replace_attention(make(features_only=True, out_indices=(0, 1)), layer)
    assert [feature.shape[-1] for feature in backbone(x)] == [2, 2]


def test_fused_attention_is_as_timm_was_told():
    model, x = make(), images()
    fused = zoo.replace_attention(copy.deepcopy(model), "softmax")
    set_fused_attn(False)
    try:
        spelled_out = zoo.replace_attention(model, "softmax")
    finally:
        set_fused_attn(True)
    assert {m.fused_attn for m in mechanisms(fused).values()} == {True} != {m.fused_attn for m in mechanisms(spelled_out).values()}
    torch.testing.assert_close(fused(x), spelled_out(x))


def test_a_whole_model_can_be_pickled():
    model, buffer = zoo.replace_attention(make(), "entmax", gate="head"), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images()), model(images()))


def test_resizing_and_new_heads_still_work():
    model = zoo.replace_attention(make("beit"), "entmax15")
    model.set_input_size(img_size=(48, 48))
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 3)


def test_entmax_starts_near_softmax_if_told_to():
    model, x = make(), images()
    before = model(x)
    differences = [(zoo.replace_attention(make(), "entmax", alpha=alpha)(x) - before).abs().max() for alpha in (1.0001, 1.1, 1.5)]
    assert differences[0] < 1e-3 < differences[1] < differences[2]
    learned, fixed = (zoo.replace_attention(make(), layer)(x) for layer in ("entmax", "entmax15"))
    torch.testing.assert_close(learned, fixed, atol=1e-5, rtol=1e-4)


def test_patterns_and_repetition():
    model, x = make(depth=4), images()
    before = model(x)
    zoo.replace_attention(model, "softmax", where="blocks.[01]", gate="head")
    zoo.replace_attention(model, "entmax15", where=["blocks.1.attn", "blocks.3.*"])
    assert {name: module.normalizer for name, module in mechanisms(model).items()} == {
        "blocks.0.attn.mechanism": "softmax", "blocks.1.attn.mechanism": "entmax15", "blocks.3.attn.mechanism": "entmax15"}
    zoo.replace_attention(model, "softmax")
    torch.testing.assert_close(model(x), before)  # the gates of the first two are still there, and ½
    assert [block.attn.gate is None for block in model.blocks] == [False, False, True, True]


class Mean(nn.Module):
    """Every query attends to all keys alike."""

    def __init__(self, num_heads, head_dim, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.full((num_heads, 1, 1), factor))

    def forward(self, q, k, v, bias, scale, dropout):
        return self.factor * v.mean(-2, keepdim=True).expand_as(v)


def test_a_class_or_partial_of_ones_own():
    for layer, args in ((Mean, dict(factor=2.0)), (partial(Mean, factor=2.0), {})):
        attn, x = zoo.replace_attention(make(), layer, **args).blocks[0].attn, torch.randn(2, 5, 48)
        v = attn.qkv(x)[..., 96:]
        torch.testing.assert_close(attn(x), attn.proj(2 * v.mean(1, keepdim=True).expand_as(v)))


class Theirs(nn.Module):
    """Somebody's attention with timm's fields: `cube` makes it another function."""

    def __init__(self, cube=False):
        super().__init__()
        self.num_heads, self.scale, self.cube = 2, 8**-0.5, cube
        self.qkv, self.proj, self.attn_drop, self.proj_drop = nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(0), nn.Dropout(0)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        z = q @ k.mT * self.scale
        return self.proj(((z**3 if self.cube else z).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_attention_with_timms_fields_is_replaced_if_it_computes_the_same():
    model, x = nn.Sequential(Theirs()), torch.randn(2, 6, 16)
    before = model(x)
    zoo.replace_attention(model, "softmax", gate="element")
    torch.testing.assert_close(model(x), before)
    other = nn.Sequential(Theirs(cube=True)).train()
    with pytest.raises(InputError, match="0 is Theirs, and it computes something other than softmax attention"):
        zoo.replace_attention(other, "softmax")
    assert type(other[0]) is Theirs and other[0].training and not mechanisms(other)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(layer="hedgehg"), "there is no attention 'hedgehg'; softmax, .* are known; did you mean hedgehog"),
    (dict(layer="entmax15", where="blocks.7"), "the model has no module 'blocks.7'; did you mean .*blocks"),
    (dict(layer="entmax15", where="blocks.0.mlp"), r"where='blocks.0.mlp' names blocks.0.mlp \(Mlp\), which is no attention"),
    (dict(layer="softmax", gate="row"), "gate must be None, 'head' or 'element', got 'row'"),
    (dict(layer="entmax", alpha=2.5), "no attention for blocks.0.attn can be made: alpha is where .* between 1 and 2, got 2.5"),
    (dict(layer="softmax", normaliser="x"), "no attention for blocks.0.attn can be made: .*unexpected keyword argument 'normaliser'"),
    (dict(layer=lambda num_heads, head_dim: nn.Identity()), "Identity for blocks.0.attn does not run on queries, keys and values"),
    (dict(layer=lambda num_heads, head_dim: Mean(num_heads + 1, head_dim)), "Mean for blocks.0.attn does not run on"),
])
def test_what_cannot_be_done_is_named_and_leaves_the_model_as_it_was(arguments, message):
    model = make()
    before, out, types = repr(model), model(images()), [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=message) as raised:
        zoo.replace_attention(model, **arguments)
    assert "\n" not in str(raised.value)
    assert repr(model) == before and types == [type(module) for module in model.modules()] and torch.equal(model(images()), out)


@pytest.mark.parametrize(("name", "message"), [
    ("resnet18", "ResNet holds no attention with timm's fields"),
    ("pvt_v2_b0", r"stages.0.blocks.0.attn is Attention, which lacks qkv of timm's Attention"),
    ("xcit_nano_12_p16_224", "blocks.0.attn is XCA, which lacks scale"),
    ("swinv2_cr_tiny_ns_224", "attn is WindowMultiHeadAttention"),
    ("tap_fan_nano", "is TokenMixing, which lacks qkv"),
])
def test_models_of_other_attention_are_refused_by_name(name, message):
    model = timm.create_model(name)
    before = repr(model)
    with pytest.raises(InputError, match=message):
        zoo.replace_attention(model, "entmax15")
    assert repr(model) == before


def test_a_second_gate_weights_to_drop_and_foreign_forwards_are_refused():
    model = zoo.replace_attention(make(), "softmax", gate="element", where="blocks.1")
    with pytest.raises(InputError, match=r"blocks.1.attn has a gate already; gate=None keeps it"):
        zoo.replace_attention(model, "softmax", gate="head")
    assert model.blocks[0].attn.gate is None
    with pytest.raises(InputError, match=r"does not fit blocks.0.attn, Attention, which drops attention weights \(attn_drop 0.1\)"):
        zoo.replace_attention(make(attn_drop_rate=0.1), "hedgehog")
    model = make()
    model.blocks[0].attn.forward = lambda x, **_: x
    with pytest.raises(InputError, match="blocks.0.attn has a forward of its own"):
        zoo.replace_attention(model, "softmax")


def test_weights_that_two_blocks_share_are_doubled_once():
    model, x = make(), images()
    model.blocks[1].attn.proj = model.blocks[0].attn.proj
    before = model(x)
    zoo.replace_attention(model, "softmax", gate="head")
    torch.testing.assert_close(model(x), before)


def test_files_of_timms_gated_attention_load():
    gated = Attention(48, 3, qkv_bias=True, gated=True)
    ours = zoo.layers.SelfAttention(48, 3, gate="element", qkv_bias=True)
    ours.load_state_dict(gated.state_dict())
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(ours(x), gated(x))


def test_our_attention_as_attn_layer():
    class Sparse(zoo.layers.SelfAttention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, normalizer="entmax", gate="head", **kwargs)

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, attn_layer=Sparse)
    assert model(images()).shape == (2, 5) and len(mechanisms(model)) == 2
    with pytest.raises(ValueError, match="normalizer must be one of softmax, .*, got 'softmx'"):
        zoo.layers.SelfAttention(48, 3, "softmx")
    with pytest.raises(ValueError, match="gate must be None, 'head' or 'element', got 'heads'"):
        zoo.layers.SelfAttention(48, 3, gate="heads")


def test_hedgehog_never_makes_a_matrix_of_tokens():
    layer = HedgehogAttention(2, 8)
    q, k, v = torch.randn(3, 1, 2, 3000, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(q, k, v).sum().backward()
    assert max(t.numel() for t in kept) <= 2 * 3000 * 16
    with pytest.raises(ValueError, match="feature_map must be one of softmax_dim, exp_dim, got 'relu'"):
        HedgehogAttention(2, 8, feature_map="relu")
    with pytest.raises(ValueError, match=r"skip needs feature_dim to be head_dim \(8\), got 4"):
        HedgehogAttention(2, 8, 4, skip=True)
