"""Every recipe: what it does to pictures, how its learning rate goes, and whether what it names exists."""
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from zoo.mm.config import load_config
from zoo.mm.datasets import LabelledImages, Sample

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "classification").glob("*.py"))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8))


class OnePicture(LabelledImages):
    def __init__(self, **transform):
        super().__init__(["it"], transform)

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> tuple[Image.Image, int]:
        return PICTURE, 0


def _augmentations() -> dict[str, dict]:
    """The recipes' ways to train on pictures, each once, by the recipe that has it first; small."""
    found: dict[str, dict] = {}
    for name in RECIPES:
        transform = {**load_config(name).train_dataloader.dataset.transform.to_dict(), "input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        if transform not in found.values():
            found[name] = transform
    return found


AUGMENTATIONS = _augmentations()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_takes_whatever_it_draws(name):
    data = OnePicture(**AUGMENTATIONS[name])
    for seed in range(3000):
        assert data[Sample(0, seed)]["inputs"].isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m9-mstd2-inc1", "rand-m1-mstd2", "augmix-m9", "v0", "v0r", "original", "originalr", "3a"])
def test_no_policy_of_timm_asks_for_zero_bits(policy):
    steps = OnePicture(is_training=True, input_size=(3, 8, 8), auto_augment=policy).transform.transforms
    parts = [part for step in steps for group in (getattr(step, "ops", ()), *getattr(step, "policy", ())) for part in group]
    assert parts
    random.seed(0)
    for part in parts:
        part.prob = 1.0
        for _ in range(100):
            part(PICTURE)
    assert auto_augment.posterize(PICTURE, 1) and auto_augment.NAME_TO_OP["Posterize"] is auto_augment.posterize  # timm's own as they were
