"""Tokens in files: those of the network, computed once, whole or not at all, and never those of something else."""
import dataclasses
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import zoo
from zoo.changes import change
from zoo.checkpoints import ModelInfo, load_trained
from zoo.errors import InputError
from zoo.probe import head_for
from zoo.probing import tokens as cache
from zoo.probing.tokens import cached_tokens
from zoo.probing.training import Recipe, Trained, heads_of, train_head, write_probe
from zoo.reading.discovery import discover
from zoo.reading.own_data import divided

CONFIG = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0, crop_mode="center")
INFO = ModelInfo("vit_tiny_patch16_224", (), CONFIG)
ARGS = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
TRAIN, VAL = 22, 6


def network(**args):
    torch.manual_seed(0)
    model = timm.create_model(INFO.name, **ARGS, **args).eval()
    for parameter in model.parameters():  # so that tokens of different pictures differ
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Of two classes, which differ in their colour."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            pixels = random.integers(0, 160, (32, 32, 3), dtype=np.uint8)
            pixels[..., 2 * (i % 2)] += 90
            folder = root / part / ("red", "blue")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def data(pictures):
    return divided(discover(pictures))


@pytest.fixture
def small_files(monkeypatch):
    """Of 5 pictures each."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 5 * 4 * 16 * 32)


def everything(tokens, name="tokens"):
    return torch.cat([tokens[part].rows(name, range(len(tokens[part]))) for part in ("train", "val")])


def expected(model, data, norm=True):
    probe = zoo.probe(model, 2, 1, norm=norm)
    transform = timm.data.create_transform(**CONFIG)
    samples = [sample for part in ("train", "val") for sample in data.splits[part]]
    return probe.tokens(torch.stack([transform(Image.open(sample.path)) for sample in samples]))


@pytest.mark.parametrize("norm", [True, False])
def test_tokens_are_the_networks(data, tmp_path, small_files, norm):
    model = network()
    done = []
    tokens = cached_tokens(model, INFO, data, tmp_path / "tokens", norm=norm, batch=3, progress=lambda *told: done.append(told))
    patches = expected(model, data, norm)
    bound = dict(rtol=1e-3, atol=2e-3)  # of float16
    torch.testing.assert_close(everything(tokens), patches, **bound)
    torch.testing.assert_close(everything(tokens, "mean"), patches.mean(1, keepdim=True), **bound)
    if norm:
        images = torch.stack([timm.data.create_transform(**CONFIG)(Image.open(sample.path)) for sample in data.splits["val"]])
        torch.testing.assert_close(tokens["val"].rows("class_token", range(VAL)), model.forward_features(images)[:, :1], **bound)
    assert tokens["train"].labels.tolist() == [sample.labels[0] for sample in data.splits["train"]]
    assert done[-1] == ("val", VAL, VAL) and ("train", TRAIN, TRAIN) in done
    torch.testing.assert_close(tokens["train"].rows("tokens", [17, 3, 17]), patches[[17, 3, 17]], **bound)


def test_memory_is_that_of_one_file(data, tmp_path, small_files, monkeypatch):
    """No file holds more pictures than it may, and no more are with the network than a batch."""
    seen = []
    model = network()
    forward = model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda x: seen.append(len(x)) or forward(x))
    cached_tokens(model, INFO, data, tmp_path / "tokens", batch=3)
    files = sorted((tmp_path / "tokens").iterdir())
    assert [file.stem for file in files] == [*(f"train-{i:05d}" for i in range(5)), *(f"val-{i:05d}" for i in range(2))]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.get_slice("tokens").get_shape()[0] <= 5 and opened.get_slice("tokens").get_dtype() == "F16"
    assert max(seen) <= 3


def test_what_was_interrupted_goes_on(data, tmp_path, small_files, monkeypatch):
    model, folder = network(), tmp_path / "tokens"
    whole = everything(cached_tokens(model, INFO, data, tmp_path / "unbroken"))
    computed = []
    read = cache.open_picture

    def reading(path, channels):
        computed.append(path)
        if len(computed) == 14:  # the first of each part is read once more
            raise KeyboardInterrupt
        return read(path, channels)

    monkeypatch.setattr(cache, "open_picture", reading)
    with pytest.raises(KeyboardInterrupt):
        cached_tokens(model, INFO, data, folder, batch=2)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["train-00000.safetensors", "train-00001.safetensors"]
    times = [file.stat().st_mtime_ns for file in files]
    files_damaged = (tmp_path / "again").with_suffix(".d")
    shutil.copytree(folder, files_damaged)
    computed[:] = [None] * 100
    torch.testing.assert_close(everything(cached_tokens(model, INFO, data, folder, batch=2)), whole, rtol=0, atol=0)
    assert [file.stat().st_mtime_ns for file in files] == times
    assert len(computed) - 100 == TRAIN + VAL - 10 + 2
    last = files_damaged / "train-00001.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    torch.testing.assert_close(everything(cached_tokens(model, INFO, data, files_damaged)), whole, rtol=0, atol=0)


def test_tokens_of_something_else_are_noticed(pictures, tmp_path):
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    data, folder = divided(discover(copy)), tmp_path / "tokens"
    kept = everything(cached_tokens(network(), INFO, data, folder))
    torch.testing.assert_close(everything(cached_tokens(network(), INFO, divided(discover(copy)), folder)), kept)
    changed = network()
    changed.blocks[1].mlp.fc2.bias.data[3] += 1e-3
    other = dataclasses.replace(INFO, data_config={**CONFIG, "mean": (0.4,) * 3})
    for model, info, norm, message in (
            (changed, INFO, True, "something was different: weights; give another --work-dir, or delete that folder"),
            (network(), other, True, "something was different: preparation of pictures;"),
            (network(), dataclasses.replace(INFO, name="deit"), True, r"something was different: model \(vit_\S+, now deit\);"),
            (network(), INFO, False, r"something was different: norm \(after the last norm, now before the last norm\);")):
        with pytest.raises(InputError, match=message):
            cached_tokens(model, info, data, folder, norm=norm)
    picture = next(copy.rglob("*.png"))
    content, status = picture.read_bytes(), picture.stat()
    picture.write_bytes(content)  # the same length at another time
    with pytest.raises(InputError, match="something was different: data;"):
        cached_tokens(network(), INFO, data, folder)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    cached_tokens(network(), INFO, data, folder)
    picture.rename(picture.parents[1] / ("red" if picture.parent.name == "blue" else "blue") / "moved.png")
    with pytest.raises(InputError, match="something was different: data;"):
        cached_tokens(network(), INFO, divided(discover(copy)), folder)


@pytest.mark.parametrize("scale", [1e6, 1e-7])
def test_tokens_beyond_half_precision_are_kept_in_full(data, tmp_path, scale):
    model = network()
    model.norm.weight.data *= scale
    model.norm.bias.data *= scale
    tokens = cached_tokens(model, INFO, data, tmp_path / "tokens")
    torch.testing.assert_close(everything(tokens), expected(model, data), atol=1e-5 * scale, rtol=1e-4)


def test_tokens_that_are_no_numbers_are_refused(data, tmp_path):
    model = network()
    model.norm.bias.data[3] = float("nan")
    with pytest.raises(InputError, match="tokens that are not finite numbers"):
        cached_tokens(model, INFO, data, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("pooling", ["linear", "attentive", "simpool", "class"])
def test_heads_learn_and_become_checkpoints(data, tmp_path, pooling):
    model = network()
    tokens = cached_tokens(model, INFO, data, tmp_path / "tokens")
    poolings, queries = heads_of(model, [pooling], None)
    assert (poolings, queries) == ([pooling], 32)
    epochs = []
    found = train_head(tokens, 2, pooling, 8, Recipe(epochs=12, batch=5, lr=1e-2), progress=epochs.append)
    assert found.accuracy == 100 and epochs == list(range(1, 13)) and found.seconds > 0
    assert found.parameters == {"linear": 66, "class": 66, "attentive": 66 + 8 * 32 + 32 * 32, "simpool": 66 + 64 + 2 * 32 * 32}[pooling]
    again = train_head(tokens, 2, pooling, 8, Recipe(epochs=12, batch=5, lr=1e-2))
    for one, other in zip(found.head.state_dict().values(), again.head.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    write_probe(found, model, INFO, data.classes, ARGS, 8, True, tmp_path / "probe.pth")
    probe, info = load_trained(tmp_path / "probe.pth")
    assert info.classes == ("blue", "red") and info.input_size == (3, 32, 32) and probe.pooling == pooling
    images = torch.stack([timm.data.create_transform(**CONFIG)(Image.open(sample.path)) for sample in data.splits["val"]])
    assert (probe(images).argmax(1) == tokens["val"].labels).all()
    torch.testing.assert_close(probe(images), found.head(probe.tokens(images)))


def test_a_head_that_is_measured_wrongly_would_show(data, tmp_path):
    """Accuracy is of the part for validation: labels that are all wrong there give 0."""
    tokens = cached_tokens(network(), INFO, data, tmp_path / "tokens")
    turned = {**tokens, "val": dataclasses.replace(tokens["val"], labels=1 - tokens["val"].labels)}
    assert isinstance(found := train_head(turned, 2, "linear", 1, Recipe(epochs=12, batch=5, lr=1e-2)), Trained) and found.accuracy == 0


def test_wrong_wishes(data, tmp_path):
    with pytest.raises(InputError, match="--epochs 0 --batch 64 --lr 0.001: there has to be 1 epoch"):
        Recipe(epochs=0)
    with pytest.raises(InputError, match="queries can be 1, 2, 4, 8, 16, 32"):
        heads_of(network(), None, 3)
    with pytest.raises(InputError, match="no class token, of which --heads class could be made; attentive, simpool, linear can be"):
        heads_of(network(class_token=False, global_pool="avg"), ["class"], None)
    with pytest.raises(InputError, match="heads learn classes of whole pictures"):
        cached_tokens(network(), INFO, dataclasses.replace(data, task="masks", form="pictures and masks"), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()
    with pytest.raises(InputError, match="a head learns from 2 pictures or more"):
        one = dataclasses.replace(data, splits={**data.splits, "train": data.splits["train"][:1]})
        train_head(cached_tokens(network(), INFO, one, tmp_path / "tokens"), 2, "linear", 1, Recipe())


def test_the_network_stays_as_it_was(data, tmp_path):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cached_tokens(model, INFO, data, tmp_path / "tokens", norm=False)
    assert isinstance(model.norm, nn.LayerNorm) and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_probe_of_a_network_that_was_changed_is_built_again(tmp_path):
    changes = ({"type": "remove_attention", "blocks": [0]}, {"type": "replace_attention", "layer": "entmax15", "where": "blocks.1"})
    changed = network()
    change(changed, changes)
    head = head_for(32, 3, "attentive", 4).eval()
    info = dataclasses.replace(INFO, changes=changes)
    write_probe(Trained("attentive", head, 0, 0.0, 0.0), changed, info, ["a", "b", "c"], ARGS, 4, True, tmp_path / "probe.pth")
    model, found = load_trained(tmp_path / "probe.pth")
    assert list(found.changes) == list(changes) and found.classes == ("a", "b", "c")
    image = torch.randn(1, 3, 32, 32)
    expected = head(changed.eval().forward_features(image)[:, 1:])
    torch.testing.assert_close(model(image), expected)
