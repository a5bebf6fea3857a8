"""Vision transformers of dual attention."""
import copy

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.checkpoints import load_model
from zoo.exporting.onnx import export_onnx
from zoo.models.vidat import NormedPatchEmbed


def make(**args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vidat_nano_patch16_224", depth=2, **args).eval()


def test_patches_are_normalised_with_all_their_numbers():
    embed = NormedPatchEmbed(32, 8, 3, 16, norm_layer=nn.LayerNorm)
    nn.init.normal_(embed.norm_in.weight)
    nn.init.normal_(embed.norm_in.bias)
    x = torch.randn(2, 3, 32, 32)
    patch = x[1, :, 8:16, 24:32]
    normed = (patch - patch.mean()) / (patch.var(correction=0) + 1e-5).sqrt() * embed.norm_in.weight + embed.norm_in.bias
    expected = embed.norm(embed.proj.weight.flatten(1) @ normed.flatten() + embed.proj.bias)
    torch.testing.assert_close(embed(x)[1, 4 + 3], expected, atol=1e-5, rtol=1e-4)


def test_symbols_are_retrieved_before_each_block_by_the_same_layer():
    model, x = make(), torch.randn(1, 3, 64, 64)
    seen = []
    model.symbol_retriever.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, return_prefix_tokens=False, output_fmt="NLC")
    assert len(seen) == 2 and torch.equal(seen[1][:, 1:], maps[0])  # the second block's are of what the first puts out
    assert sum("symbol" in name for name, _ in model.named_parameters()) == 4
    for other in (copy.deepcopy(model), make()):
        other.load_state_dict(model.state_dict())
        other.symbol_retriever.symbol_library.data.mul_(2)
        assert not torch.allclose(other(x), model(x))


def test_files_of_another_number_of_channels_and_size(tmp_path):
    torch.save(make().state_dict(), tmp_path / "w.pth")
    overlay = dict(file=str(tmp_path / "w.pth"))
    gray = make(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, img_size=64)
    assert gray.patch_embed.norm_in.weight.shape == (1, 16, 16) and gray.pos_embed.shape == (1, 17, 96)
    assert gray(torch.randn(1, 1, 64, 64)).isfinite().all()


def test_exports_with_free_batch_and_sizes(tmp_path):
    model, info = load_model("vidat_nano_patch16_224", in_chans=1, num_classes=10, depth=1)
    result = export_onnx(model, info, tmp_path / "x.onnx", size=(64, 64))
    assert result.free_batch and result.free_size, result.reason


def test_what_is_captured():
    model = make()
    with torch.no_grad(), zoo.capture(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    assert maps["blocks.1.attn.relational_attention"]["relations"].shape == (1, 2, 17, 17)
    assert maps["blocks.1.attn.self_attention"]["attention"].shape == (1, 2, 17, 17)
    assert maps["symbol_retriever"]["attention"].shape == (1, 4, 17, 16)


@pytest.mark.parametrize(("args", "message"), [
    (dict(qkv_bias=True), "dual attention has no qkv_bias"),
    (dict(qk_norm=True), "dual attention has no qk_norm"),
    (dict(num_heads=4), "heads are self_heads and relational_heads, got num_heads 4"),
    (dict(weight_init="jax"), "weight_init must be '', 'reset' or 'skip', got 'jax'"),
    (dict(self_heads=5, relational_heads=2), r"self_heads \+ relational_heads must divide dim \(96\), got 7"),
])
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        make(**args)
    model = make()
    with pytest.raises(ValueError, match=r"patch_size stays \(16, 16\), for which patches are normalised, got 8"):
        model.set_input_size(patch_size=8)
