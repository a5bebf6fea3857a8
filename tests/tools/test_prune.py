"""`zoo prune`: checkpoints without attention or heads, which load, train on, and are exported."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
from zoo.attention_removal import diluted_blocks
from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.layers.attention_removal import NoAttention

NAME, CLASSES = "deit_nano_patch16_224_cb", ("dark", "light")


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("prune").main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoint and pictures: six of two classes."""
    folder, random = tmp_path_factory.mktemp("prune"), np.random.default_rng(0)
    torch.manual_seed(0)
    args = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=48, depth=3, num_classes=2)
    record = {"task": "classification", "model": NAME, "model_args": args, "classes": list(CLASSES), "input_size": (1, 32, 32),
              "mean": (0.5,), "std": (0.25,), "interpolation": "bilinear", "crop_pct": 1.0}
    state = {f"model.{key}": value for key, value in timm.create_model(NAME, **args).state_dict().items()}
    torch.save({"zoo": record, "state_dict": state}, folder / "whole.pth")
    for place, name in enumerate(CLASSES):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(place * 128, place * 128 + 128, (40, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{i}.png")
    return folder


def outputs(checkpoint):
    model, _ = load_trained(checkpoint)
    with torch.inference_mode():
        return model(torch.linspace(-1, 1, 1024).reshape(1, 1, 32, 32))


def test_attention_that_is_to_fade_out(main, folder, tmp_path, capsys):
    main([str(folder / "whole.pth"), str(folder / "pictures"), "--attention", "2", "-o", str(tmp_path / "p.pth"), "--batch", "4"])
    out = capsys.readouterr().out
    model, info = load_trained(tmp_path / "p.pth")
    assert torch.equal(outputs(tmp_path / "p.pth"), outputs(folder / "whole.pth"))
    first, second = info.changes[0]["blocks"]
    assert f"chosen, in this order: {first}, {second}" in out and diluted_blocks(model) == {first: 1.0, second: 1.0}
    rows = {int(line.split()[0]): line.split()[1:] for line in out.splitlines() if line[:5].strip().isdigit()}
    assert [len(rows[block]) for block in range(3)] == [1 if block == first else 2 for block in range(3)]
    assert rows[first][0].endswith("*") and rows[second][1].endswith("*")
    entropies = zoo.choose_blocks(load_trained(folder / "whole.pth")[0], seen(folder), 1)[0].entropies
    assert {block: float(cells[0].rstrip("*")) for block, cells in rows.items()} == pytest.approx(entropies, abs=0.006)
    assert f"zoo train {NAME} DATA --weights {tmp_path / 'p.pth'}" in out and "accuracy on these pictures: " in out


def seen(folder):
    pictures = [np.asarray(Image.open(path)) for path in sorted((folder / "pictures").rglob("*.png"))]
    return [(torch.tensor(np.stack(pictures))[:, None, 4:36] / 255 * 4 - 2, None)]


def test_attention_that_is_gone_at_once_and_then_heads(main, folder, tmp_path, capsys):
    """Changes follow one another, and what is loaded is what was written."""
    main([str(folder / "whole.pth"), str(folder / "pictures"), "--attention", "1", "--at-once", "-o", str(tmp_path / "p.pth")])
    main([str(tmp_path / "p.pth"), str(folder / "pictures"), "--heads", "0.4", "-o", str(tmp_path / "q.pth")])
    assert "heads" in capsys.readouterr().out
    model, info = load_trained(tmp_path / "q.pth")
    assert [change["type"] for change in info.changes] == ["remove_attention", "prune_heads"]
    assert sum(isinstance(block.attn, NoAttention) for block in model.blocks) == 1
    assert sum(getattr(block.attn, "num_heads", 0) for block in model.blocks) == 4
    by_hand, _ = load_trained(folder / "whole.pth")
    zoo.remove_attention(by_hand, info.changes[0]["blocks"])
    zoo.prune_heads(by_hand, info.changes[1]["heads"])
    with torch.inference_mode():
        assert torch.equal(outputs(tmp_path / "q.pth"), by_hand(torch.linspace(-1, 1, 1024).reshape(1, 1, 32, 32)))


def test_a_share_of_nothing_is_taken_out_when_loaded(main, folder, tmp_path):
    main([str(folder / "whole.pth"), str(folder / "pictures"), "--attention", "1", "-o", str(tmp_path / "p.pth")])
    content = torch.load(tmp_path / "p.pth")
    block, = content["zoo"]["changes"][0]["blocks"]
    content["state_dict"][f"model.blocks.{block}.attention_share"].zero_()
    torch.save(content, tmp_path / "p.pth")
    model, info = load_trained(tmp_path / "p.pth")
    assert isinstance(model.blocks[block].attn, NoAttention) and info.changes[-1] == {"type": "remove_attention", "blocks": [block]}


def test_a_registered_model_with_a_file_of_weights(main, folder, tmp_path):
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    main(["test_vit", str(folder / "pictures"), "--weights", str(tmp_path / "w.pth"), "--attention", "1", "-o", str(tmp_path / "p.pth")])
    loaded, info = load_trained(tmp_path / "p.pth")
    assert info.name == "test_vit" and torch.equal(loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(("model", "arguments", "said"), [
    ("whole.pth", ["--attention", "4"], "has 3 blocks with all of their attention, of which 4 were to be chosen"),
    ("whole.pth", ["--heads", "1.5"], "heads must be a share between 0 and 1"),
    ("whole.pth", ["--heads", "0.5", "--at-once"], "--at-once is for --attention"),
    ("whole.pth", ["--attention", "1", "--pretrained"], "go with the name of a registered model"),
    ("whole.pth", ["--attention", "1", "--batch", "0"], "--batch 0: it is above 0"),
    ("test_vit", ["--attention", "1"], "there is no checkpoint test_vit; that is a model's name, whose weights would be random"),
    ("test_vit", ["--heads", "0.5", "--weights", "whole.pth"], "whole.pth does not hold the weights of test_vit"),
    ("test_vid", ["--attention", "1", "--pretrained"], "go with the name of a registered model, and test_vid is none"),
    ("lambda_deit_nano_02", ["--attention", "1", "--pretrained"], "there are no weights of lambda_deit_nano_02 to download"),
])
def test_what_cannot_be_pruned_is_said_and_nothing_is_written(main, folder, tmp_path, monkeypatch, model, arguments, said):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=said):
        main([model, "pictures", *arguments, "-o", str(tmp_path / "p.pth")])
    assert not list(tmp_path.iterdir())


def test_heads_need_labels(main, folder, tmp_path):
    with pytest.raises(InputError, match="no picture is in a folder named after a class.*; the classes are dark, light"):
        Image.new("L", (32, 32)).save(tmp_path / "x.png")
        main([str(folder / "whole.pth"), str(tmp_path), "--heads", "0.5", "-o", str(tmp_path / "p.pth")])


def test_outputs_that_are_no_checkpoint(main, folder, tmp_path):
    with pytest.raises(InputError, match="p.onnx is no name of a checkpoint; it has to end in .pth"):
        main([str(folder / "whole.pth"), str(folder / "pictures"), "--attention", "1", "-o", str(tmp_path / "p.onnx")])


@pytest.mark.parametrize(("changes", "said"), [
    ("all", "records changes='all', where a list of changes"), ([{"type": "system"}], "where a list of changes, each of a type prune_"),
    ([{"type": "remove_attention", "blocks": [9]}], "blocks of BroadcastingVisionTransformer are 0 to 2, got 9"),
])
def test_records_of_changes_that_cannot_be_made(folder, tmp_path, changes, said):
    content = torch.load(folder / "whole.pth")
    content["zoo"]["changes"] = changes
    torch.save(content, tmp_path / "p.pth")
    with pytest.raises(InputError, match=said):
        load_trained(tmp_path / "p.pth")
