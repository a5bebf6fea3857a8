"""DeiT without the attention of some blocks, beside timm's DeiT whose attention is taken out."""
import json
from pathlib import Path

import pytest
import timm
import torch

import zoo
from zoo.errors import InputError
from zoo.layers.attention_removal import NoAttention

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"


def authors_file(path: Path, share: float | None = None, **args) -> tuple[torch.nn.Module, dict]:
    """What the authors' code saves: all of DeiT, whose removed blocks still have their attention; and the plain network."""
    plain = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, **args)
    state = plain.state_dict() | ({} if share is None else {"blocks.2.attention_share": torch.tensor(share)})
    torch.save({"model": state}, path)
    return plain.eval(), dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **args)


def test_files_with_the_removed_attention_load(tmp_path):
    plain, args = authors_file(tmp_path / "tiny_024.pth", share=0.0)
    ours, x = timm.create_model("lambda_deit_tiny_024", **args).eval(), torch.randn(1, 3, 64, 96)
    zoo.remove_attention(plain, [0, 2, 4])
    assert ours.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), atol=1e-5, rtol=1e-5)


def test_nothing_else_of_a_file_is_left_out(tmp_path):
    plain, args = authors_file(tmp_path / "w.pth", depth=4)
    for name in ("blocks.1.norm1.extra", "blocks.2.norm2.extra", "blocks.2.attention", "blocks.20.attn.proj.weight"):
        torch.save(plain.state_dict() | {name: torch.ones(2)}, tmp_path / "w.pth")
        with pytest.raises(InputError, match=rf"such as {name} \(of no use\)"):
            timm.create_model("lambda_deit_tiny_024", removed=(0, 2), **args)


def test_a_file_with_some_of_the_attention_left_is_refused(tmp_path):
    _, args = authors_file(tmp_path / "w.pth", share=0.25, depth=4)
    with pytest.raises(InputError, match="a share of 0.25 of the attention in block 2, and the model has none"):
        timm.create_model("lambda_deit_tiny_024", removed=(0, 2), **args)


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("lambda_deit_*.json")), ids=lambda path: path.stem)
def test_the_name_says_which_blocks_have_no_attention(path):
    with torch.device("meta"):
        blocks = timm.create_model(path.stem).blocks
    named = [int(digit) for digit in path.stem.rpartition("_")[2]]
    assert [i for i, block in enumerate(blocks) if isinstance(block.attn, NoAttention)] == named
    held = json.loads(path.read_text())["state"]
    assert [i for i in range(12) if f"blocks.{i}.attn.qkv.weight" not in held] == named


@pytest.mark.parametrize("removed", [(4,), (0, -1)])
def test_blocks_that_there_are_not(removed):
    with pytest.raises(ValueError, match="removed must be blocks from 0 to 3, got"):
        timm.create_model("lambda_deit_nano_02", removed=removed)
