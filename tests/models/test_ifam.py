"""Two vision transformers in a row: what the second sees, in every form of the mask."""
import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import zoo
from zoo.checkpoints import load_model
from zoo.exporting.onnx import export_onnx
from zoo.models.ifam import TwoStageVisionTransformer


def stage(**args) -> VisionTransformer:
    return timm.create_model("vit_tiny_patch16_224", **{**dict(img_size=64, embed_dim=24, depth=2, num_heads=2), **args})


def make(depth=2, **args) -> TwoStageVisionTransformer:
    """With attention far from uniform, so that it matters what is seen."""
    torch.manual_seed(0)
    model = timm.create_model("ifam_nano_patch16_224", depth=depth, num_classes=5, **args).eval()
    with torch.no_grad():
        for block in [*model.stage_1.blocks, *model.stage_2.blocks]:
            block.attn.qkv.weight.mul_(10)
        model.parts.prototypes.mul_(3)
    return model


def images(batch=3, height=64, width=96):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_what_is_masked_does_not_count():
    """Another image in the place of the masked patches, where stage 2 looks, changes nothing; elsewhere it does."""
    model, x = make(), images()
    parts, _ = model.discover(x)
    hidden = (parts.mask == 0).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    assert hidden.any() and not hidden.all()
    with torch.no_grad():
        expected = model._stage_2(x, parts)[0]
        torch.testing.assert_close(model._stage_2(torch.where(hidden, x.flip(0), x), parts)[0], expected, atol=1e-6, rtol=0)
        assert not torch.allclose(model._stage_2(torch.where(hidden, x, x.flip(0)), parts)[0], expected, atol=1e-3)
    assert (expected[:, 1:].abs().sum(2) == 0).equal(parts.mask.flatten(1) == 0)


@pytest.mark.parametrize("pool", ["token", "avg", "max", ""])
@pytest.mark.parametrize("size", [(64, 96), (16, 16), (75, 33)], ids=str)
def test_dropping_masked_patches_gives_what_masking_gives(pool, size):
    model, x = make(global_pool=pool, num_parts=1), images(4, *size)
    tokens, seen = [], []
    model.stage_2.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        for drop in (False, True):
            model.drop_masked = drop
            tokens.append((model(x), model.forward_features(x), model.forward_intermediates(x, norm=True)))
        counts = model.discover(x)[0].mask.flatten(1).sum(1)
    torch.testing.assert_close(*tokens, atol=1e-5, rtol=1e-5)
    assert seen[0] == 1 + -(-size[0] // 16) * -(-size[1] // 16) and seen[-1] == 1 + counts.max()
    assert size != (64, 96) or seen[-1] < seen[0]


def test_dropping_everything_leaves_the_class_token():
    model, x = make(), images()
    with torch.no_grad():
        model.parts.prototypes[:-1] = 100  # which no patch is near
        expected = model(x)
        model.drop_masked = True
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(expected[:1].expand_as(expected), expected)  # of all images the same


def test_what_is_in_training_is_not_dropped():
    model, x = make(drop_masked=True, mask_drop_rate=0, part_drop_rate=0).train(), images()
    seen = []
    model.stage_2.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    model(x).sum().backward()
    assert seen == [25]


def gradients(model, x, training=True):
    model.train(training).zero_grad()
    model.parts.exponential = torch.ones_like  # no noise
    out = model(x)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_who_learns_from_stage_2():
    """Of hard masks nobody in stage 1; of straight-through ones all that finds parts, and outputs are those of hard ones."""
    x, args = images(), dict(mask_drop_rate=0, part_drop_rate=0)
    (hard, of_hard), (through, of_through), (soft, of_soft) = (
        gradients(make(mask=mask, **args), x) for mask in ("hard", "straight_through", "soft"))
    first = [name for name in of_hard if name.startswith(("stage_1.", "parts.prototypes"))]
    assert first and all(of_hard[name] is None for name in first)
    for of in (of_through, of_soft):
        assert all(of[name].isfinite().all() and of[name].abs().sum() > 0 for name in first if not name.endswith("attn.qkv.bias"))
    torch.testing.assert_close(through, hard, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(soft, hard, atol=1e-2)
    torch.testing.assert_close(of_through["head.weight"], of_hard["head.weight"], atol=1e-4, rtol=1e-4)


def test_the_straight_through_gradient_is_that_of_attention_in_the_mask():
    """By differences, of masks between 0 and 1 that weigh keys; also of patches that are masked."""
    model, x = make(mask="straight_through").double().train(), images(1, 32, 48).double()
    parts, _ = model.eval().discover(x)
    mask = torch.tensor([[[1.0, 0, 1], [0, 1, 1]]], dtype=torch.float64, requires_grad=True)

    def out(mask):
        return model.train().forward_head(model._stage_2(x, parts._replace(mask=mask))[0]).square().sum()

    found, = torch.autograd.grad(out(mask), mask)
    for row in range(2):
        for column in range(3):
            step = torch.zeros_like(mask)
            step[0, row, column] = 1e-6
            there, back = (out((mask + sign * step).detach()) for sign in (1, -(mask[0, row, column] > 0).double()))
            slope = (there - back) / (1e-6 * (1 + (mask[0, row, column] > 0)))
            # a patch that is masked weighs 1e-10 there
            torch.testing.assert_close(found[0, row, column], slope, atol=1e-7, rtol=1e-3)
    assert found[0, 0, 1].abs() > 1e-8 and found[0, 1, 0].abs() > 1e-8


def test_in_evaluation_straight_through_masks_are_hard():
    x, hard, through = images(), make(), make(mask="straight_through")
    assert torch.equal(hard(x), through(x))


@pytest.mark.parametrize("mask", ["hard", "straight_through", "soft"])
def test_training_compiles_whole_and_checkpoints(mask):
    x, found = images(), []
    for change in (lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
                   lambda model: model.set_grad_checkpointing() or model):
        found.append(gradients(change(make(mask=mask, mask_drop_rate=0, part_drop_rate=0)), x))
    for _, (out, grads) in enumerate(found[1:]):
        torch.testing.assert_close(out, found[0][0], atol=1e-5, rtol=1e-4)
        named = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
        for name, grad in found[0][1].items():
            if grad is None:
                assert named[name] is None
            else:
                torch.testing.assert_close(named[name], grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("noise", ["training", "always"])
def test_noise_in_evaluation(noise):
    model, x = make(noise=noise), images()
    assert torch.equal(model(x), model(x)) == (noise == "training")


def test_any_two_vision_transformers():
    """Of other widths, depths, prefix tokens, norms before pooling; for any size, with the weights that they had."""
    torch.manual_seed(0)
    first, second = stage(embed_dim=36, depth=1, reg_tokens=2, global_pool="avg"), stage(reg_tokens=4, no_embed_class=True, init_values=0.1)
    weights, norm = copy.deepcopy(second.state_dict()), first.fc_norm
    model = TwoStageVisionTransformer(first, second, num_classes=7, num_parts=3).eval()
    assert model.stage_1.norm is norm and model.stage_1 is first and model.stage_2 is second
    for size in ((64, 64), (50, 97)):
        assert model(images(2, *size)).shape == (2, 7)
    assert model.discover(images())[0].maps.shape == (3, 4, 4, 6)
    for name, value in model.stage_2.state_dict().items():
        assert torch.equal(value, weights[name]), name
    everything = model._stage_2(images(), model.discover(images())[0]._replace(mask=torch.ones(3, 4, 6)))[0]
    plain = stage(reg_tokens=4, no_embed_class=True, init_values=0.1, num_classes=0, dynamic_img_size=True).eval()
    plain.load_state_dict({name: value for name, value in weights.items() if not name.startswith("head")})
    torch.testing.assert_close(everything, plain.forward_features(images()), atol=1e-5, rtol=1e-5)


def test_freezing_of_the_recipe():
    model = make(mask="hard").train()
    model.freeze_first()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learning if name.startswith("stage_1")} == {"stage_1.cls_token", "stage_1.pos_embed"}
    assert {name.partition(".")[0] for name in learning} == {"stage_1", "stage_2", "parts", "part_head", "fc_norm", "head"}


def test_files_of_the_authors_names_other_classes_and_sizes(tmp_path):
    model = make(num_parts=3)
    theirs = {"parts.prototypes": "stage_1.fc_landmarks.weight", "parts.modulation": "stage_1.modulation",
              "part_head": "stage_1.fc_class_landmarks", "fc_norm": "stage_2.fc_norm", "head": "stage_2.head"}
    state = {}
    for name, value in model.state_dict().items():
        old = next((old for ours, old in theirs.items() if name.startswith(ours)), None)
        known = next((ours for ours in theirs if name.startswith(ours)), "")
        state[f"{old}{name.removeprefix(known)}" if old else name] = value[..., None, None] if name == "parts.prototypes" else value
    torch.save({"model": {**state, "stage_2.prefix_attn_mask": torch.ones(1, 1)}}, tmp_path / "w.pth")
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    same = timm.create_model("ifam_nano_patch16_224", depth=2, num_parts=3, num_classes=5, **overlay).eval()
    assert torch.equal(same(images()), model(images()))
    other = timm.create_model("ifam_nano_patch16_224", depth=2, num_parts=3, num_classes=4, img_size=96, in_chans=1, **overlay).eval()
    assert other.part_head.weight.shape == other.head.weight.shape == (4, 96) and other.stage_2.pos_embed.shape[1] == 37
    assert torch.equal(other.parts.prototypes, model.parts.prototypes)
    headless = timm.create_model("ifam_nano_patch16_224", depth=2, num_parts=3, num_classes=0, **overlay)
    assert headless(images()).shape == (3, 96)


@pytest.mark.parametrize("mask", ["hard", "straight_through", "soft"])
def test_exports_with_free_batch_and_sizes_and_the_same_answers(tmp_path, mask):
    import onnxruntime

    model, info = load_model("ifam_nano_patch16_224", in_chans=1, num_classes=10, depth=1, mask=mask)
    result = export_onnx(model, info, tmp_path / "x.onnx", size=(64, 64))
    assert result.free_batch and result.free_size, result.reason
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    for size in ((2, 1, 64, 64), (1, 1, 75, 130)):
        x = torch.randn(size)
        out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.tensor(out), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_what_is_captured():
    model = make()
    with torch.no_grad(), zoo.capture(model) as maps:
        model(images())
        parts, logits = model.discover(images())
    assert torch.equal(maps[""]["part_logits"], logits) and logits.shape == (3, 5)
    assert torch.equal(maps["parts"]["maps"], parts.maps) and parts.maps.shape == (3, 5, 4, 6)


def test_plays_with_replaced_attention():
    """Mechanisms that take a bias see the mask as timm's attention does."""
    model, x = make(), images()
    expected = model(x)
    zoo.replace_attention(model, "softmax")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    with zoo.capture(model) as maps:
        model(x)
    seen = maps["stage_2.blocks.1.attn.mechanism"]["attention"][..., 1:].sum((1, 2)) > 0
    assert torch.equal(seen, maps["parts"]["mask"].flatten(1) > 0)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: make(mask="harder"), "mask must be one of hard, straight_through, soft, got 'harder'"),
    (lambda: make(mask="soft", drop_masked=True), "drop_masked needs a mask that hides patches, which mask='soft' does not"),
    (lambda: make(global_pool="map"), "global_pool must be one of '', 'token', 'avg', 'max', 'avgmax', got 'map'"),
    (lambda: make(patch_drop_rate=0.5), r"stage_1 drops patches at random \(patch_drop_rate\)"),
    (lambda: TwoStageVisionTransformer(nn.Identity(), stage()), "stage_1 must be one of timm's VisionTransformer, got Identity"),
    (lambda: TwoStageVisionTransformer(stage(), stage(patch_size=8)), r"have patches of one size .* \(16, 16\) and 3 channels .* \(8, 8\)"),
    (lambda: TwoStageVisionTransformer(stage(), stage(class_token=False, global_pool="avg")), "stage_2 must have a class token"),
    (lambda: TwoStageVisionTransformer(*[stage()] * 2), "stage_1 and stage_2 must be two networks, got one twice"),
    (lambda: make().forward_intermediates(images(), output_fmt="NHWC"), "output_fmt must be NCHW or NLC, got 'NHWC'"),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
