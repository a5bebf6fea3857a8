"""Models saved by timm's `save_for_hf` load elsewhere by `import zoo` alone. No network: the hub is a folder here."""
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from timm.models import _hub

import zoo
from zoo.measuring.model_table import listed

LIGHT = [*(name for name in listed() if "_nano" in name and "3d" not in name), "attention_unet_sknet_nano"]
ELSEWHERE = """
import sys, timm, torch, zoo
for folder in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.save((model(torch.ones(1, 1, 48, 40)), model.pretrained_cfg["mean"]), f"{folder}/found.pt")
"""


def saved(name: str, folder) -> torch.nn.Module:
    torch.manual_seed(0)
    own = {} if zoo.models.is_dense(name) and name not in zoo.list_models(mechanism="gates") else dict(num_classes=3)
    model = timm.create_model(name, in_chans=1, **own).eval()
    data_config = dict(input_size=(1, 48, 40), mean=(0.1,), std=(0.2,))
    labels = dict(label_names=["a", "b", "c"]) if own else {}
    _hub.save_for_hf(model, folder, model_config=labels, safe_serialization=True, data_config=data_config)
    return model


@pytest.mark.long
def test_saved_folders_load_elsewhere(tmp_path):
    models = {name: saved(name, tmp_path / name) for name in LIGHT}
    folders = [str(tmp_path / name) for name in LIGHT]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        found, mean = torch.load(tmp_path / name / "found.pt")
        with torch.no_grad():
            torch.testing.assert_close(found, model(torch.ones(1, 1, 48, 40)))
        assert tuple(mean) == (0.1,)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's functions that timm calls, on a folder: OWNER/NAME below it is a repository."""
    def download(repo_id, filename, revision=None, cache_dir=None, **_):
        path = tmp_path / "hub" / repo_id / filename
        if not path.exists():
            raise huggingface_hub.utils.EntryNotFoundError(f"no {filename}")
        return str(path)

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def file_exists(self, repo_id, filename, **_):
            return (tmp_path / "hub" / repo_id / filename).exists()

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    monkeypatch.setattr(_hub, "HfApi", Api)
    return tmp_path / "hub"


def test_pushed_models_come_back(hub):
    name = "attnet_nano"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    _hub.push_to_hf_hub(model, "somebody/something", safe_serialization=True)
    assert {path.name for path in (hub / "somebody/something").iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    found = timm.create_model("hf-hub:somebody/something", pretrained=True).eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(found(x), model(x))
    assert timm.create_model("hf-hub:somebody/something", pretrained=True, num_classes=7).num_classes == 7
