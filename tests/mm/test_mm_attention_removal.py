"""Attention that fades out while a network is trained: in configs, resumed, with an average, and with the best checkpoint kept."""
import pytest
import torch
from mmengine.config import Config

from zoo.attention_removal import diluted_blocks
from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.layers.attention_removal import NoAttention
from zoo.mm import evaluate
from zoo.mm.checkpoint import load_from_local
from zoo.mm.config import load_config
from zoo.mm.hooks import AttentionDilutionHook

CHANGES = "model.changes=[{'type':'remove_attention','blocks':[0,2],'share':1.0}]"
HOOKS = "custom_hooks=[{'type':'ModelEMAHook','decay':0.5},{'type':'AttentionDilutionHook'}]"
FOUR = [CHANGES, HOOKS, "train_cfg.max_epochs=4", "train_cfg.val_interval=1"]


def share(checkpoint: dict) -> float:
    shares = {value.item() for name, value in checkpoint["state_dict"].items() if name.endswith("attention_share")}
    assert len(shares) == 1
    return shares.pop()


def test_attention_fades_out_and_what_is_loaded_has_none(tiny_train):
    best = [f"default_hooks.checkpoint.{option}" for option in ("save_best=accuracy/top1", "rule=greater", "max_keep_ckpts=4")]
    last, metrics, folder = tiny_train("run", *FOUR, *best)
    written = [load_from_local(folder / f"epoch_{epoch}.pth") for epoch in (1, 2, 3, 4)]
    assert [share(checkpoint) for checkpoint in written] == [1.0, 0.5, 0.0, 0.0]
    assert last["zoo"]["changes"] == [{"type": "remove_attention", "blocks": [0, 2], "share": 1.0}]
    kept, = folder.glob("best_*.pth")
    assert share(load_from_local(kept)) == 0.0
    half, _ = load_trained(folder / "epoch_2.pth")
    assert diluted_blocks(half) == {0: 0.5, 2: 0.5}
    gone, info = load_trained(folder / "epoch_4.pth")
    assert [isinstance(block.attn, NoAttention) for block in gone.blocks] == [True, False, True, False, False, False]
    assert info.changes[-1] == {"type": "remove_attention", "blocks": [0, 2]}
    assert evaluate(folder / "biformer_nano_digits.py", folder / "epoch_4.pth") == metrics


def test_resumed_runs_end_as_unbroken_ones(tiny_train):
    unbroken, _, _ = tiny_train("unbroken", *FOUR)
    _, _, folder = tiny_train("first", *FOUR[:2], "train_cfg.max_epochs=4", "default_hooks.checkpoint.max_keep_ckpts=4")
    resumed, _, _ = tiny_train("resumed", *FOUR, resume=folder / "epoch_2.pth")
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


@pytest.mark.parametrize(("options", "said"), [
    ([HOOKS], "AttentionDilutionHook finds no block with a share of attention; the model's changes say which"),
    ([CHANGES, HOOKS, "train_cfg.max_epochs=1"], "attention fades out over at least 2 epochs"),
    ([CHANGES.replace("[0,2]", "[0,9]")], "blocks of VisionTransformer are 0 to 5, got 9"),
    ([CHANGES.replace("remove", "move")], "there is no change 'move_attention'; did you mean remove_attention"),
])
def test_what_cannot_fade_out_is_said(tiny_train, options, said):
    with pytest.raises(InputError, match=said):
        tiny_train("run", *options)


def test_parts_of_no_run():
    with pytest.raises(InputError, match="part must be above 0 and at most 1, got 1.5"):
        AttentionDilutionHook(1.5)


@pytest.mark.parametrize("name", ["lambda_deit_nano_02_digits", "lambda_deit_tiny_024_in1k"])
def test_recipes_end_with_the_network_of_their_name(name):
    config: Config = load_config(name)
    assert f"{config.model.name}_" in name and "AttentionDilutionHook" in [hook.type for hook in config.custom_hooks]
    change, = config.model.changes
    assert change.share == 1.0 and list(change.blocks) == [int(digit) for digit in config.model.name.rpartition("_")[2]]
