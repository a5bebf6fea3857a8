import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from zoo.errors import InputError
from zoo.seeing.mechanism_pictures import COLOURS, PICTURES
from zoo.seeing.page import LEGEND


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("visualize")


@pytest.fixture(scope="module")
def main(tool):
    return tool.main


@pytest.fixture
def grey(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "grey.png"
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(path)
    return str(path)


def test_writes_pictures_and_the_page(main, grey, tmp_path, capsys):
    assert main(["sknet_nano", grey, "-o", str(tmp_path / "seen"), "--attributions", "gradcam", "gradcam"]) == 0
    assert "wrote 5 pictures and" in capsys.readouterr().out
    assert len(list((tmp_path / "seen").glob("*.png"))) == 5 and (tmp_path / "seen" / "index.html").stat().st_size > 10_000
    assert len(list((tmp_path / "seen").iterdir())) == 6


class _Page(HTMLParser):
    """Texts of what is shown, by tag, and the alternatives of pictures."""

    def __init__(self, text: str):
        super().__init__()
        self.texts, self.alts, self.meta, self.tag = [], [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag, found = tag, dict(attributes)
        if tag == "img":
            self.alts.append(found["alt"])
        if tag == "meta" and "name" in found:
            self.meta[found["name"]] = found["content"]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_says_what_is_random_what_colours_mean_and_what_pictures_show(main, grey, tmp_path, capsys):
    assert main(["biformer_nano", grey, "-o", str(tmp_path / "seen"), "--attributions", "gradcam"]) == 0
    assert "note: The weights of biformer_nano are random" in capsys.readouterr().err
    page = _Page((tmp_path / "seen" / "index.html").read_text())
    assert any("weights of biformer_nano are random" in text for text in page.texts) and "width=device-width" in page.meta["viewport"]
    for colour, (_, meaning) in LEGEND.items():
        assert (meaning in page.texts) == (colour in ("from", "routes", "heat")), colour
    assert all(alt.startswith("grey.png, ") for alt in page.alts)
    assert "the red region attends to" in page.alts[0] and "how much each place speaks for class" in page.alts[-1]
    assert re.search(r"speaks for class \d+, 0\.\d% probable: no class of 1000 has as much as 1%", page.alts[-1])


def test_likely_classes_are_offered_by_name(main, checkpoint, grey, tmp_path, capsys):
    arguments = [str(checkpoint), grey, "--attributions", "gradcam"]
    assert main([*arguments, "-o", str(tmp_path / "seen")]) == 0
    assert "random" not in capsys.readouterr().err
    page = _Page((tmp_path / "seen" / "index.html").read_text())
    assert not any("random" in text for text in page.texts)
    names = re.search(r"speaks for (\w+), ([\d.]+)% probable; other classes: (.*)\.$", page.alts[-1])
    others = re.findall(r"(\w+) ([\d.]+)%", names[3])
    assert {names[1], *(name for name, _ in others)} <= {"circle", "square", "star"} and all(float(value) >= 1 for _, value in others)


@pytest.mark.parametrize("name", ["test_resnet", "fan_tiny_12_p16_224"])
def test_attributions_need_no_layer_with_a_picture(main, grey, tmp_path, capsys, name):
    assert main([name, grey, "-o", str(tmp_path / "seen"), "--attributions", "gradcam"]) == 0
    assert "wrote 1 pictures and" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"001-gradcam.png", "index.html"}


def test_gates_go_into_a_folder_too(main, grey, tmp_path, capsys):
    Image.new("L", (33, 50), 5).save(tmp_path / "black.png")
    assert main(["attention_unet_nano", grey, str(tmp_path / "black.png"), "-o", str(tmp_path / "v4g")]) == 0
    files = sorted(path.name for path in (tmp_path / "v4g").iterdir())
    count = (len(files) - 1) // 2
    assert f"wrote {2 * count} pictures and" in capsys.readouterr().out and files[-1] == "index.html"
    assert files[0] == "001-decoder-0-gate.png" and "002-image.png" in files and count > 2
    with Image.open(tmp_path / "v4g" / files[0]) as gate:
        assert gate.size == (60, 40)
    page = (tmp_path / "v4g" / "index.html").read_text()
    assert len(re.findall('src="data:image/png;base64,', page)) == 2 * count and "black.png" in page


@pytest.mark.parametrize(("model", "arguments", "message"), [
    ("sknet_nano", ["--attributions", "cam"], "no attribution 'cam'"),
    ("sknet_nano", ["--slice", "3"], "--slice is for volumes, and sknet_nano takes whole pictures"),
    ("sknet_nano", ["--query", "0", "0"], "--query is for BiLevelRoutingAttention, .*, and sknet_nano has none of these layers"),
    ("sknet_nano", ["--target", "1000"], "class number from 0 to 999, got 1000"),
    ("sknet_nano", ["--target", "1000", "--attributions"], "--target is for attributions, and none is asked for"),
    ("test_resnet", ["--attributions"], "test_resnet has no layer with a picture of its own"),
    ("biformer_nano", ["--query", "0", "1", "--attributions"], "the query is at least 0 and less than 1"),
    ("attention_unet_nano", ["--query", "0", "0"], "--query is for classifiers, and attention_unet_nano segments"),
    ("attention_unet_nano", ["--attributions", "gradcam"], "--attributions is for classifiers"),
    ("attention_unet_nano", ["--target", "0"], "--target is for classifiers"),
    ("attention_unet_nano", ["--slice", "0"], "slice 0 is asked for, but .*grey.png is a picture"),
    ("attention_unet3d_nano", [], "is a 3-D network and takes volumes"),
    ("unet", [], "unet has no attention gates to show"),
    ("a2n_nano_x2", [], "a2n_nano_x2 restores pictures: it names no classes"),
])
def test_options_that_would_do_nothing_are_refused(main, grey, tmp_path, model, arguments, message):
    with pytest.raises(InputError, match=message):
        main([model, grey, "-o", str(tmp_path / "seen"), *arguments])
    assert not list(tmp_path.iterdir())


def test_one_sheet_is_for_one_input(main, grey, tmp_path):
    with pytest.raises(InputError, match="fit into one picture, and 2 were given; give a folder instead of .*seen.png"):
        main(["attention_unet_nano", grey, grey, "-o", str(tmp_path / "seen.png")])
    with pytest.raises(InputError, match="grey.png is one of the files given and would be overwritten"):
        main(["attention_unet_nano", grey, "-o", grey])
    for model, name in (("attention_unet_nano", "seen.html"), ("sknet_nano", "seen.png")):
        with pytest.raises(InputError, match=f"{name} is neither a folder nor the name of"):
            main([model, grey, "-o", str(tmp_path / name)])
    assert main(["attention_unet_nano", grey, "-o", str(tmp_path / "seen.png")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["seen.png"]


@pytest.mark.parametrize("model", ["sknet_nano", "attention_unet_nano"])
def test_what_cannot_be_written_is_said_before_the_work(tool, grey, monkeypatch, model):
    def works(*_, **__):
        raise AssertionError("the work has begun")
    for name in ("classifiers.mechanisms", "classifiers.attribution", "gate_pictures.see_gates"):
        monkeypatch.setattr(f"zoo.seeing.{name}", works)
    for output in (f"{grey}/sub", f"{grey}/sub/further", "x" * 300, grey + "/../" + "x" * 300):
        with pytest.raises(InputError, match="cannot"):
            tool.main([model, grey, "-o", output])


def test_every_mechanism_says_which_colours_it_uses():
    assert set(COLOURS) == set(PICTURES)
    assert {colour for colours in COLOURS.values() for colour in colours} == set(LEGEND) - {"gates"}
