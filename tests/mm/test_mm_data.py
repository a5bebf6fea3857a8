import random

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from zoo.errors import InputError
from zoo.mm.config import load_config
from zoo.mm.datasets import DigitsDataset, ImageFolderDataset, ReproducibleSampler, Sample, seeded
from zoo.mm.metrics import Accuracy


def _batches(dataset, epoch: int, workers: int) -> torch.Tensor:
    sampler = ReproducibleSampler(dataset, seed=3)
    sampler.set_epoch(epoch)
    loader = DataLoader(dataset, batch_size=16, sampler=sampler, num_workers=workers, collate_fn=default_collate)
    return torch.cat([batch["inputs"] for batch in loader])


@pytest.fixture(scope="module")
def digits():
    config = load_config("biformer_nano_digits", ["train_dataloader.dataset.limit=64"])
    return DATASETS.build(config.train_dataloader.dataset)


def test_augmentation_depends_on_seed_epoch_and_image_alone(digits):
    first = _batches(digits, epoch=1, workers=0)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert torch.equal(first, _batches(digits, epoch=1, workers=2))
    assert not torch.equal(first, _batches(digits, epoch=2, workers=0))
    assert not torch.equal(digits[Sample(0, 1)]["inputs"], digits[Sample(0, 2)]["inputs"])
    seeds = []
    for seed, epoch in ((3, 1), (3, 2), (4, 1)):
        sampler = ReproducibleSampler(digits, seed=seed)
        sampler.set_epoch(epoch)
        seeds.append({sample.seed for sample in sampler})
    assert len(set.union(*seeds)) == 3 * len(digits)


def test_seeding_a_sample_leaves_the_generators_as_they_were():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with seeded(5):
        torch.rand(3), np.random.rand(3), random.random()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def _shares(monkeypatch, ranks: int, size: int, **arguments) -> list[list[Sample]]:
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr("zoo.mm.datasets.get_dist_info", lambda rank=rank: (rank, ranks))
        sampler = ReproducibleSampler(range(size), **arguments)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    return shares


def test_ranks_share_a_global_batch_in_turn(monkeypatch):
    whole, = _shares(monkeypatch, 1, 20, seed=4)
    left, right = _shares(monkeypatch, 2, 20, seed=4)
    assert [sample for pair in zip(left, right, strict=True) for sample in pair] == whole
    assert sorted(sample.index for sample in whole) == list(range(20))


def test_evaluation_hands_out_every_image_once(monkeypatch):
    shares = _shares(monkeypatch, 4, 18, shuffle=False)
    assert sorted(sample.index for share in shares for sample in share) == list(range(18))


def test_repeated_augmentation(monkeypatch):
    samples, = _shares(monkeypatch, 1, 30, repeats=3)
    assert len(samples) == 30
    assert all(len({sample.index for sample in samples[at:at + 3]}) == 1 for at in range(0, 30, 3))
    assert len({sample.index for sample in samples}) == 10
    assert len({sample.seed for sample in samples}) == 30
    shares = _shares(monkeypatch, 3, 30, repeats=3)
    assert [[s.index for s in share] for share in shares[1:]] == [[s.index for s in shares[0]]] * 2


def test_digits_are_split_once_and_evenly():
    transform = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    train, held_out = (DigitsDataset(split, transform) for split in ("train", "val"))
    assert (len(train), len(held_out)) == (1437, 360)
    assert set(np.bincount(held_out.digits.targets)) <= {35, 36, 37}
    pixels = [{image.tobytes() for image in part.digits.images} for part in (train, held_out)]
    assert not pixels[0] & pixels[1]
    assert train[Sample(0, 0)]["inputs"].shape == (1, 32, 32)
    assert DigitsDataset("val", {"input_size": 32}, mode="RGB")[Sample(0, 0)]["inputs"].shape == (3, 32, 32)
    assert held_out.data_config["crop_pct"] == 0.875 and held_out.data_config["input_size"] == (1, 32, 32)


def test_image_folders(tmp_path):
    with pytest.raises(InputError, match="no data folder"):
        ImageFolderDataset(str(tmp_path / "nope"), "train", {})
    with pytest.raises(InputError, match="has no val/"):
        ImageFolderDataset(str(tmp_path), "val", {})
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("L", (40, 30), 200).save(tmp_path / "val" / name / "a.png")
    (tmp_path / "val" / "dog" / "b.jpg").write_text("no picture")
    dataset = ImageFolderDataset(str(tmp_path), "val", {"input_size": 24})
    dataset.full_init()
    assert dataset.metainfo["classes"] == ["cat", "dog"] and len(dataset) == 3
    assert dataset[Sample(1, 0)]["inputs"].shape == (3, 24, 24) and dataset[Sample(1, 0)]["targets"] == 1
    with pytest.raises(InputError, match="b.jpg is not a picture that can be read"):
        dataset[Sample(2, 0)]


def test_accuracy_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(57, 12, generator=generator), torch.randint(12, (57,), generator=generator)
    metric = Accuracy(topk=(1, 5, 20))
    metric.dataset_meta = {"classes": list(range(12))}
    for part in torch.arange(57).split(10):
        metric.process(None, [{"scores": scores[i], "target": targets[i]} for i in part])
    expected = {}
    for k in (1, 5):
        hits = sum(sorted(range(12), key=lambda c: -scores[i, c])[:k].count(int(targets[i])) for i in range(57))
        expected[f"accuracy/top{k}"] = 100 * hits / 57
    assert metric.evaluate(57) == pytest.approx(expected)
    assert not metric.results
