"""VMamba: sizes that lose a row, maps of one row, finer maps, whose weights decay, and the authors' names."""
import pytest
import timm
import torch
from torch import nn

from zoo.models.vmamba import PatchMerging, VMamba, VSSBlock, checkpoint_filter_fn


def make(**args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vmamba_nano_v0", num_classes=5, **args).eval()


def test_merging_loses_odd_rows_and_keeps_single_ones():
    torch.manual_seed(0)
    merging = PatchMerging(3, 5)
    x = torch.randn(2, 5, 7, 3)
    with torch.no_grad():
        assert torch.equal(merging(x), merging(x[:, :4, :6]))
        parts = [x[:, i:4:2, j:6:2] for j in (0, 1) for i in (0, 1)]  # down first, then to the right
        torch.testing.assert_close(merging(x), merging.reduction(merging.norm(torch.cat(parts, -1))))
        for single in (x[:, :1], x[:, :, :1], x[:, :1, :1]):
            doubled = single.repeat_interleave(2 if single.shape[1] == 1 else 1, 1).repeat_interleave(2 if single.shape[2] == 1 else 1, 2)
            torch.testing.assert_close(merging(single), merging(doubled))


def test_merging_of_stride_1_has_that_of_stride_2_at_every_other_place():
    torch.manual_seed(0)
    every, other = PatchMerging(3, 5, stride=1), PatchMerging(3, 5)
    other.load_state_dict(every.state_dict())
    x = torch.randn(2, 6, 4, 3)
    with torch.no_grad():
        assert every(x).shape == (2, 6, 4, 5)
        torch.testing.assert_close(every(x)[:, ::2, ::2], other(x))


@pytest.mark.parametrize("size", [(1, 1), (2, 35), (61, 90)], ids=str)
def test_any_size_and_an_empty_batch(size):
    model, x = make(), torch.randn(2, 3, *size)
    with torch.no_grad():
        assert model(x).isfinite().all() and model(x[:0]).shape == (0, 5)
        rows, columns = (max(n - n % 4, min(n, 4)) for n in size)
        torch.testing.assert_close(model(x[..., :rows, :columns]), model(x))


def test_what_is_no_matter_of_decay():
    model = make()
    left = model.no_weight_decay()
    assert len(left) == 2 * 5 and {name.rpartition(".")[2] for name in left} == {"A_logs", "Ds"}


def test_the_norm_of_a_block_alone_and_of_one_in_a_network():
    assert VSSBlock(8, eps=1e-6).norm.eps == 1e-6
    assert {module.eps for module in make().modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


def test_names_of_a_merging_end_a_stage_there_and_begin_one_here():
    names = {"layers.0.downsample.reduction.weight": "stages.1.downsample.reduction.weight",
             "layers.2.blocks.1.self_attention.A_logs": "stages.2.blocks.1.attn.A_logs", "patch_embed.norm.bias": "stem.norm.bias",
             "layers.1.blocks.0.ln_1.weight": "stages.1.blocks.0.norm.weight", "head.weight": "head.fc.weight", "norm.bias": "norm.bias"}
    value = torch.zeros(1)
    assert list(checkpoint_filter_fn(dict.fromkeys(names, value), make())) == list(names.values())


def test_stages_have_to_agree():
    with pytest.raises(ValueError, match=r"dims and depths must be of the same stages, got \(8, 16\) and \(1, 1, 1\)"):
        VMamba(dims=(8, 16), depths=(1, 1, 1))
