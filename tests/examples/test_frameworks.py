"""The examples of "In your framework": each is run as it stands, on real data, without a network, and does what the page says."""
import re
import runpy
import socket
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "guides" / "frameworks.md"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """Runs a file of examples/ in an empty folder, with nobody else to be reached; returns its variables."""
    connect = socket.socket.connect

    def refused(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"the example asks {address}")
        return connect(self, address)

    def run(name: str, *arguments: object) -> dict:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        monkeypatch.setattr(socket.socket, "connect", refused)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def fell(losses: list[float]) -> bool:
    return min(losses[-3:]) < 0.95 * losses[0]


@pytest.mark.long
def test_torchvision_detectors(run_example):
    made = run_example("torchvision_detectors")
    assert made["losses"].keys() == {"Faster R-CNN", "Mask R-CNN", "RetinaNet"} and all(map(fell, made["losses"].values()))
    assert made["found"]["Mask R-CNN"]["masks"].shape[1:] == (1, 96, 96)


def test_torchvision_segmentation(run_example):
    assert fell(run_example("torchvision_segmentation")["losses"])


def test_plain_loop(run_example):
    assert run_example("plain_loop")["accuracy"] > 0.6


def test_lightning(run_example):
    made = run_example("lightning_digits")
    assert made["trainer"].callback_metrics["accuracy"] > 0.6
    trained, loaded = made["classifier"].model.state_dict(), made["model"].state_dict()
    assert all(torch.equal(trained[name].cpu(), loaded[name]) for name in loaded)


def test_transformers_trainer(run_example, tmp_path):
    made = run_example("transformers_trainer")
    assert made["evaluated"]["eval_accuracy"] > 0.6
    pictures = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = made["model"].cpu().eval()(pictures).logits
        torch.testing.assert_close(made["again"](pictures).logits, expected)
        torch.testing.assert_close(made["network"].eval()(pictures), expected)


def test_transformers_detectors(run_example):
    made = run_example("transformers_detectors")
    assert all(map(fell, made["losses"].values())) and len(made["losses"]) == 2
    pictures = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(made["again"](pictures).logits, made["rt_detr"].eval()(pictures).logits)


def test_monai_flexible_unet(run_example):
    made = run_example("monai_flexible_unet")
    assert fell(made["losses"])
    assert made["model"](torch.randn(1, 1, 32, 96)).shape == (1, 11, 32, 96)


def test_monai_volumes(run_example):
    made = run_example("monai_volumes")
    assert fell(made["losses"]) and made["dice"].aggregate().item() > 0.2
    gates = [layer for layer in made["network"].modules() if type(layer).__module__ == "zoo.layers.attention_gate"]
    assert len(gates) == 2


def test_smp_decoders(run_example):
    assert fell(run_example("smp_decoders")["losses"])


BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE.read_text(), re.S))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_page_says_what_is_run(name):
    """Every line of a block stands in its file, in this order; no use takes more than fifteen."""
    lines = [line.rstrip() for line in BLOCKS[name].splitlines() if line.strip()]
    assert len(lines) <= 15
    file = iter(line.rstrip() for line in (EXAMPLES / f"{name}.py").read_text().splitlines())
    for line in lines:
        assert line in file, f"examples/{name}.py lacks, or has at another place: {line}"


def test_every_example_is_on_the_page():
    assert BLOCKS.keys() <= {path.stem for path in EXAMPLES.glob("*.py")}
    pages = PAGE.read_text() + (PAGE.parent / "yolo.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name})" in pages, path.name
