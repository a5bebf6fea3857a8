"""The page of all heads: what it is told of attention, and what it shows in a browser."""
import base64
import csv
import json
import re

import numpy as np
import pytest
import timm
import torch
from chromium import PROGRAM, Chromium
from PIL import Image

from zoo.errors import InputError
from zoo.seeing import attention, attention_page
from zoo.seeing.attention import Layer
from zoo.seeing.attention_statistics import Grid
from zoo.tools.visualize import main

NETWORKS = {"test_vit": (6, 1), "tap_fan_nano": (4, 0), "biformer_nano": (1, 0), "deit_nano_patch16_224_cb": (4, 1)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a.png", "b </script> & ü.png".replace("/", "")):
        Image.fromarray(noise.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / name)
    return folder


def sharp(name, **args):
    """With attention that is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name, **args)
    for path, parameter in model.named_parameters():
        if re.search(r"(qkv|\bq|kv)\.weight", path):
            parameter.data.mul_(5)
    return model


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_that_of_the_layers(fused):
    model = sharp("test_vit")
    for module in model.modules():
        if isinstance(module, timm.layers.Attention):
            module.fused_attn = fused
    image, expected = torch.randn(1, 3, *model.default_cfg["input_size"][1:]), []
    hooks = [block.attn.qkv.register_forward_hook(lambda module, args, out: expected.append(out)) for block in model.blocks]
    found = attention.collect(model.train(), image)
    assert model.training and [m.fused_attn for m in model.modules() if isinstance(m, timm.layers.Attention)] == [fused] * 6
    for hook in hooks:
        hook.remove()
    for layer, qkv in zip(found, expected, strict=True):
        q, k, _ = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(layer.attention, (q @ k.mT * q.shape[-1]**-0.5).softmax(-1)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_their_grids(name):
    layers, prefix = NETWORKS[name]
    model = sharp(name, img_size=(64, 96)) if name == "test_vit" else sharp(name)
    found = attention.collect(model, torch.randn(1, 3, *((64, 96) if name == "test_vit" else (224, 224))))
    assert len(found) == layers
    for one, grid in found:
        assert grid.prefix == prefix and one.shape[-1] == prefix + grid.rows * grid.columns
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:2]))
        if name == "test_vit":
            assert grid[1:] == (4, 6)


def test_networks_without_such_attention_are_told(pictures, tmp_path):
    with pytest.raises(InputError, match="ResNet has no layer in which all tokens of a picture attend to one another"):
        attention.collect(timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64))
    with pytest.raises(InputError, match="--target does not go with --attention"):
        main(["test_vit", str(pictures), "-o", str(tmp_path / "seen"), "--attention", "--target", "1"])
    assert not (tmp_path / "seen").exists()


@pytest.mark.parametrize("grid", [Grid(1, 30, 50), Grid(0, 25, 3), Grid(2, 4, 5)])
def test_large_grids_are_added_up(grid):
    tokens = grid.prefix + grid.rows * grid.columns
    one = torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(0)).softmax(-1)
    pooled, small = attention_page._pooled(Layer(one, grid))
    torch.testing.assert_close(pooled.sum(-1), torch.ones(pooled.shape[:2]))
    step = max(-(-n // attention_page.SIDE) for n in grid[1:])
    assert small == (grid.prefix, -(-grid.rows // step), -(-grid.columns // step))
    corner = [grid.prefix + i * grid.columns + j for i in range(min(step, grid.rows)) for j in range(min(step, grid.columns))]
    torch.testing.assert_close(pooled[:, grid.prefix, grid.prefix], one[:, corner][:, :, corner].sum(-1).mean(-1))


def test_what_the_page_is_told(pictures, tmp_path):
    assert main(["test_vit", str(pictures), "-o", str(tmp_path / "seen"), "--attention"]) == 0
    text = (tmp_path / "seen" / "index.html").read_text()
    assert not re.search(r"url\(|@import|https?://|<link|src=\"(?!data:)", text) and "prefers-color-scheme:dark" in text
    told = [json.loads(piece) for piece in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    assert len(told) == 2 and len(told[0]["layers"]) == 6 and told[0]["names"] == ["the class token"]
    layer = told[0]["layers"][0]
    weights = np.frombuffer(base64.b64decode(layer["weights"]), np.uint8).reshape(3, 101, 101)
    scale = np.frombuffer(base64.b64decode(layer["scale"]), "<f4").reshape(3, 101, 1)
    np.testing.assert_allclose((weights * scale).sum(-1), 1, atol=0.01)
    rows = list(csv.DictReader((tmp_path / "seen" / "attention.csv").open()))
    assert len(rows) == 2 * 6 * 2 and {*rows[0]} == {"picture", "layer", "head", *attention.NUMBERS}
    assert float(rows[0]["distance"]) == pytest.approx(told[0]["numbers"][0][0]["distance"], rel=1e-5)


def test_many_pictures_and_heads_stay_a_page(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_page, "PICTURES", 1)
    monkeypatch.setattr(attention_page, "MOST", 10)
    assert main(["test_vit", str(pictures), "-o", str(tmp_path / "seen"), "--attention"]) == 0
    text = (tmp_path / "seen" / "index.html").read_text()
    assert "first 1 of 2 pictures" in text and text.count("<canvas") == 1 and "head 1" not in text
    assert len((tmp_path / "seen" / "attention.csv").read_text().splitlines()) == 1 + 2 * 6 * 2


@pytest.mark.skipif(PROGRAM is None, reason="needs chromium (apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path):
    """A click, the arrow keys, the slider, a cell: what is said is what attention says."""
    attended = torch.full((2, 13, 13), 0.01)
    for query in range(13):
        attended[1, query, 1 + query % 12] = 0.88  # the second head looks at the next patch
    attended[0, :, 1] = 0.88
    layers = [Layer(attended.flip(0), Grid(1, 3, 4)), Layer(attended, Grid(1, 3, 4))]
    picture = Image.fromarray(np.full((60, 80, 3), 128, np.uint8))
    page, _ = attention_page.write(tmp_path / "seen", "Heads", ["one.png"], lambda _: (picture, layers))
    browser = Chromium(tmp_path / "profile")
    try:
        browser.open(page)
        said = "document.querySelector('.said').textContent"
        browser.wait(lambda: browser.value(f"document.querySelector('.said') && {said}"), "the page draws nothing")
        assert "Layer 2 of 2, mean of the heads, asked from row 2, column 3 of 3 × 4" in browser.value(said)
        browser.value("document.querySelector('button[data-layer=\"2\"][data-head=\"2\"]').click()")
        assert browser.value(said).endswith("head 2, asked from row 2, column 3 of 3 × 4: most at row 2, column 4, with 88 %; "
                                            "1.0 % goes to the class token.")
        assert browser.value("document.querySelectorAll('button[aria-pressed=true]').length") == 1
        browser.value("document.querySelector('canvas').focus()")
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
        assert "asked from row 2, column 2 of 3 × 4: most at row 2, column 3" in browser.value(said)
        left, top, width, height = browser.value("(b => [b.left, b.top, b.width, b.height])"
                                                 "(document.querySelector('canvas').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=left + 0.9 * width, y=top + 0.1 * height, button="left", clickCount=1)
        assert "asked from row 1, column 4 of 3 × 4: most at row 2, column 1" in browser.value(said)
        # Of the middle row, away from the mark in the first, the left is bright.
        drawn = browser.value("[...document.querySelector('canvas').getContext('2d').getImageData(0, 168, 448, 1).data]")
        assert np.array(drawn).reshape(448, 4)[:, :3].sum(-1).argmax() < 112
        browser.value("r = document.querySelector('input[type=range]'), r.value = 1, r.dispatchEvent(new Event('input'))")
        assert "Layer 1 of 2, head 2" in browser.value(said) and "most at row 1, column 1" in browser.value(said)
        browser.value("q = document.querySelectorAll('select')[1], q.value = '0', q.dispatchEvent(new Event('input'))")
        assert "asked from the class token" in browser.value(said)
        assert not [address for address in browser.asked if address.startswith("http")]
        unnamed = browser.value("[...document.querySelectorAll('input,select,canvas,button,[role=region]')].filter(e => !(e.ariaLabel || "
                                "e.textContent || document.querySelector(`label[for=${e.id}]`))).length")
        assert unnamed == 0
    finally:
        browser.close()
