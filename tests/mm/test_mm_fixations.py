"""Fixation prediction as a task: folders found out, training by a command, metrics at the pictures' own sizes, and what does not fit."""
import csv

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from PIL import Image

from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.measuring.fixations import measured
from zoo.mm import evaluate
from zoo.mm.checkpoint import best_checkpoint
from zoo.mm.config import load_config
from zoo.mm.datasets import Sample
from zoo.mm.fixations import FixationDataset, FixationMetrics, FixationPredictor
from zoo.predicting.fixations import look
from zoo.reading.discovery import discover
from zoo.reading.fixations import read_map, read_points
from zoo.reading.pictures import open_picture
from zoo.tools import train


def write(root, split: str, count: int, points: bool = True, size=(56, 40)) -> None:
    """Noise with a bright square, which is looked at."""
    random = np.random.default_rng(len(split))
    for i in range(count):
        pixels = random.integers(0, 90, (*size[::-1], 3), dtype=np.uint8)
        looked, fixated = np.zeros(size[::-1], np.uint8), np.zeros(size[::-1], np.uint8)
        y, x = random.integers(2, size[1] - 12), random.integers(2, size[0] - 12)
        pixels[y:y + 8, x:x + 8] = 255
        looked[y:y + 8, x:x + 8] = 200
        fixated[y + 3, x + 2:x + 6] = 255
        for name, values in (("images", pixels), ("maps", looked), *([("fixations", fixated)] if points else [])):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / f"{i}{'_fix' if name == 'fixations' else ''}.png")


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "looks"
    write(root, "train", 12)
    write(root, "val", 3)
    return root


def test_folders_are_found_out(data, tmp_path):
    found = discover(data)
    assert (found.task, found.form, found.classes) == ("fixations", "pictures and maps of fixations", ("fixations",))
    assert [len(found.splits[split]) for split in ("train", "val")] == [12, 3] and "known of train, val" in found.notes[0]
    sample = found.splits["train"][1]
    assert (sample.path.parent.name, sample.mask.parent.name, sample.fixations.name) == ("images", "maps", "1_fix.png")
    other = tmp_path / "flat"
    for name in ("stimuli", "Saliency_Maps"):
        (other / name / "train").mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 9, np.uint8)).save(other / name / "train" / "a.png")
    (only,) = discover(other).splits["train"]
    assert only.mask.parent.parent.name == "Saliency_Maps" and only.fixations is None


def test_a_training_learns_evaluates_and_predicts(data, tmp_path, capsys):
    work_dir = tmp_path / "run"
    train.main(["msinet_nano", str(data), "--epochs", "2", "--batch", "4", "--size", "56", "--work-dir", str(work_dir)])
    said = capsys.readouterr().out
    assert "pictures of 56×40 pixels are seen at 56×40" in said and "fixations/auc" in said
    report = (work_dir / "report.html").read_text()
    assert "The lowest correlations with where people looked" in report and report.count("1.png: similarity") == 1
    assert Image.open(work_dir / "samples.png").width > 50
    rows = list(csv.DictReader((work_dir / "samples.csv").open()))
    assert len(rows) == 15 and rows[0]["fixations"].endswith("0_fix.png")
    checkpoint = best_checkpoint(work_dir)
    model, info = load_trained(checkpoint)
    assert (info.task, info.name, info.input_size) == ("fixations", "msinet_nano", (3, 40, 56))
    assert info.data_config["mean"][0] == pytest.approx(103.939 / 255)
    metrics = evaluate(work_dir / "config.py", checkpoint)
    expected = []
    for i in range(3):
        path = data / "val" / "images" / f"{i}.png"
        density = torch.from_numpy(np.array(read_map(data / "val" / "maps" / path.name, path, (56, 40)), np.float32))
        points = read_points(data / "val" / "fixations" / f"{i}_fix.png", path, (56, 40))
        saliency = look(model, open_picture(path), info.data_config["mean"], info.data_config["std"], info.input_size[1:])
        expected.append(measured(torch.from_numpy(saliency).float(), density, points))
    for name in ("kl", "cc", "sim", "nss", "auc"):  # of whole numbers up to 255, where the metrics have fractions
        assert metrics[f"fixations/{name}"] == pytest.approx(np.mean([each[name] for each in expected]), abs=0.05), name


def test_samples_are_fitted_for_training_alone(data):
    dataset = FixationDataset(str(data), "train", (48, 48))
    item = dataset[Sample(0, 0)]
    assert {name: tuple(value.shape) for name, value in item.items()} == {
        "inputs": (3, 48, 48), "density": (1, 48, 48), "fixations": (1, 48, 48)}
    assert item["density"][0, :7].sum() == 0 and item["density"].max() > 0.5 and item["fixations"].sum() >= 3
    assert (item["inputs"][:, 0] + torch.tensor([[103.939], [116.779], [123.68]]) - 126).abs().max() < 1e-3
    flipped = FixationDataset(str(data), "train", (48, 48), flip=1.0)[Sample(0, 0)]
    assert all(torch.equal(flipped[name], value.flip(-1)) for name, value in item.items())
    whole = FixationDataset(str(data), "val", (48, 48))[Sample(0, 0)]
    assert whole["inputs"].shape == (3, 48, 48) and whole["density"].shape == whole["fixations"].shape == (1, 40, 56)


def test_weights_to_start_from(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("msinet_nano")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    predictor = FixationPredictor("msinet_nano", weights=str(tmp_path / "w.pth"), loss=dict(type="combined", nss=0.5), freeze=True)
    predictor.init_weights()
    assert torch.equal(predictor.model.head.weight, network.head.weight) and predictor.loss.nss == 0.5
    assert not any(p.requires_grad for p in predictor.model.encoder.parameters()) and predictor.model.head.weight.requires_grad
    maps = torch.rand(2, 1, 16, 24)
    loss = predictor(torch.randn(2, 3, 16, 24), maps, (maps > 0.9).float(), mode="loss")["loss"]
    loss.backward()
    assert loss.isfinite() and predictor.model.head.weight.grad.abs().sum() > 0


def test_kinds_of_pictures_are_told_by_their_folders(data, tmp_path):
    for part in ("images", "maps", "fixations"):
        for path in sorted((data / "train" / part).iterdir()):
            folder = data / "train" / part / ("pages" if path.name.startswith(("0", "1")) else "scenes")
            folder.mkdir(exist_ok=True)
            path.rename(folder / path.name)
    dataset = FixationDataset(str(data), "train", (32, 32), conditions=dict(scenes=0, pages=3))
    items = [dataset[Sample(i, 0)] for i in range(len(dataset))]
    kinds = [int(item["condition"]) for item in items]
    assert sorted(kinds) == [0] * 8 + [3] * 4
    assert all((kind == 3) == ("pages" in name) for kind, name in zip(kinds, dataset.names, strict=True))
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    predictor = FixationPredictor("sum_nano", loss="combined")
    assert predictor(**batch, mode="loss")["loss"].isfinite()
    with torch.no_grad():
        answers = predictor.eval()(**batch, mode="predict")
        expected = predictor(batch["inputs"], condition=batch["condition"])
    torch.testing.assert_close(answers[0]["saliency"], expected[0, 0], atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="msinet_nano knows no kinds of pictures"):
        FixationPredictor("msinet_nano")(**batch, mode="loss")
    with pytest.raises(InputError, match="lies in none of the folders that conditions names: pages"):
        FixationDataset(str(data), "train", (32, 32), conditions=dict(pages=3))


def test_sums_encoder_starts_from_vmambas_weights(tmp_path):
    sizes = dict(dims=(8, 16), depths=(1, 1), state_dim=2)
    torch.manual_seed(0)
    whole = timm.create_model("vmamba_nano_v0", **sizes)
    torch.save({"model": whole.state_dict()}, tmp_path / "w.pth")
    args = dict(sizes, decoder_depths=(1, 1))
    predictor = FixationPredictor("sum_nano", args, weights=str(tmp_path / "w.pth"), freeze=True)
    predictor.init_weights()
    assert torch.equal(predictor.model.encoder.stem.proj.weight, whole.stem.proj.weight)
    assert not any(p.requires_grad for p in predictor.model.encoder.parameters()) and predictor.model.head.weight.requires_grad
    torch.save({f"salu_mamba.{name}": value for name, value in predictor.model.state_dict().items()}, tmp_path / "all.pth")
    other = FixationPredictor("sum_nano", args, weights=str(tmp_path / "all.pth"))
    other.init_weights()
    assert torch.equal(other.model.head.weight, predictor.model.head.weight)


def test_metrics_of_pictures_with_and_without_fixated_pixels():
    metric = FixationMetrics()
    maps = [torch.rand(9, 7), torch.rand(5, 6)]
    metric.process(None, [{"saliency": maps[0], "density": maps[0], "fixations": (maps[0] > 0.8).float()},
                          {"saliency": maps[1], "density": maps[1]}])
    found = metric.evaluate(2)
    assert found["fixations/cc"] == pytest.approx(1) and found["fixations/auc"] == pytest.approx(1, abs=0.05)
    metric.process(None, [{"saliency": maps[1], "density": maps[1]}])
    assert set(metric.evaluate(1)) == {"fixations/kl", "fixations/cc", "fixations/sim"}


def test_the_recipe_for_salicon(data):
    config = load_config("msinet_salicon", [f"data_root={data}"])
    assert isinstance(config, Config) and config.optim_wrapper.optimizer.lr == 1e-5 and config.train_cfg.max_epochs == 10
    assert config.train_dataloader.dataset.root == str(data)


@pytest.mark.parametrize(("name", "told"), [("sum_salicon", None), ("sum_unified", 2)])
def test_the_recipes_of_sum(data, name, told):
    config = load_config(name, [f"data_root={data}"])
    assert config.model == dict(type="FixationPredictor", name="sum", args=dict(drop_path_rate=0.3, condition=0), loss="combined")
    assert (config.optim_wrapper.optimizer.lr, config.train_dataloader.batch_size, config.train_cfg.max_epochs) == (1e-4, 16, 30)
    assert config.param_scheduler == [dict(type="StepLR", step_size=4, gamma=0.1)]
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert loader.dataset.root == str(data) and loader.dataset.size == (256, 256) and loader.dataset.mean[0] == 0.485
        assert loader.dataset.get("conditions", {}).get("salec") == told


@pytest.mark.parametrize(("arguments", "message"), [
    (["attention_unet_nano"], "attention_unet_nano is a U-Net for pictures and masks, and .* holds pictures and maps of fixations, "
                              "which need a network that says where people look, such as msinet_nano"),
    (["msinet_nan"], "there is no model msinet_nan; did you mean msinet_nano"),
])
def test_models_that_do_not_fit(data, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        train.main([*arguments, str(data), "--work-dir", str(tmp_path / "run")])


@pytest.mark.parametrize(("call", "message"), [
    (lambda data: FixationPredictor("resnet18"), "resnet18 does not say where people look"),
    (lambda data: FixationPredictor("msinet_nano", loss="divergance"), "no loss 'divergance' of fixations; .* did you mean divergence"),
    (lambda data: FixationPredictor("msinet_nano", loss=dict(type="combined", kk=1)), "the loss combined does not take"),
    (lambda data: FixationDataset(str(data / "no"), "train", (48, 48)), "there is no data folder"),
    (lambda data: FixationDataset(str(data), "tost", (48, 48)), "split='tost'"),
    (lambda data: read_map(data / "val" / "maps" / "0.png", "p.png", (40, 56)), "0.png is of shape 40×56, its picture p.png of 56×40"),
])
def test_what_cannot_be_is_named(data, call, message):
    with pytest.raises(InputError, match=message):
        call(data)


def test_an_empty_map_is_told(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="m.png is 0 everywhere"):
        read_map(tmp_path / "m.png", "p.png", (8, 8))
