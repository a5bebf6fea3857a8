"""Every recipe: what it does to pictures, how its learning rate goes, and whether what it names exists."""
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from PIL import Image
from timm.data import auto_augment
from timm.scheduler import CosineLRScheduler

from zoo.errors import InputError
from zoo.mm.config import load_config
from zoo.mm.datasets import LabelledImages, Sample
from zoo.mm.optim import WarmupCosineLR

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "classification").glob("*.py"))
ROOT = CONFIGS.parent
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
        transform = load_config(name).train_dataloader.dataset.transform.to_dict()
        transform |= {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
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


# The authors' rates, warm-up and least rates for their batches, how their loops set the rate, and the epochs of the cosine and in all:
# DeiT's and its heirs' after the epoch by its number; TAPADL's by the next one's; LITv2's after every iteration by its number.
SGD = ("steps", 0.1, 0, 0, 0, 100, 100)
DEIT = ("after", 1e-3, 1e-6, 5, 1e-5, 300, 300)
LITV2 = ("iterations", 1e-3, 1e-6, 20, 1e-5, 300, 300)
ATTNET = ("after", 4e-3, 1e-6, 5, 1e-6, 300, 300)
SCHEDULES = {
    **{f"attnet_{size}_in1k": ATTNET for size in ("xxs", "xs", "s", "t1", "t2", "t3", "t4")},
    **{f"biformer_{size}_in1k": DEIT for size in ("tiny", "small", "base")}, "deit_small_patch16_224_cb_in1k": DEIT,
    "halonet_h2_256_in1k": DEIT, "lambda_deit_tiny_024_in1k": ("after", 2e-3, 1e-6, 5, 1e-5, 400, 400),
    **{f"{name}_in1k": SGD for name in ("das_resnet50", "sknet50", "polarized_resnet50_s", "polarized_hrnet_w48_s")},
    **{f"litv2_{size}_in1k": LITV2 for size in ("s", "m", "b")},
    **{f"moh_transnext_{size}_in1k": DEIT for size in ("small_80", "small_75", "base_75", "base_50")},
    "litv2_b_384_in1k": ("iterations", 4e-5, 4e-8, 5, 4e-7, 30, 30),
    "tap_fan_base_16_p4_hybrid_in1k": ("before", 4e-3, 1e-6, 10, 1e-6, 300, 310),
}
ITERATIONS = 3  # an epoch
SLOW = 0.01


def _optimizer(rate: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate * factor} for factor in (1.0, SLOW)], lr=rate)


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def _authors(how: str, rate: float, warmup_lr: float, warmup: int, min_lr: float, cosine: int, epochs: int) -> list[list[float]]:
    """The rates of every iteration, by timm's scheduler in the authors' loop."""
    optimizer, every = _optimizer(rate), ITERATIONS if how == "iterations" else 1
    if how == "steps":
        return [[0.1 * 0.1 ** (epoch // 30) * factor for factor in (1.0, SLOW)] for epoch in range(epochs) for _ in range(ITERATIONS)]
    scheduler = CosineLRScheduler(optimizer, t_initial=cosine * every, lr_min=min_lr, warmup_t=warmup * every, warmup_lr_init=warmup_lr,
                                  t_in_epochs=how != "iterations", cycle_limit=1)
    found = []
    for epoch in range(epochs):
        for iteration in range(ITERATIONS):
            found.append(_rates(optimizer))
            if how == "iterations":
                scheduler.step_update(epoch * ITERATIONS + iteration)
        if how != "iterations":
            scheduler.step(epoch + (how == "before"))
    return found


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("in1k")])
def test_learning_rates_are_the_authors(name):
    config = load_config(name)
    expected = _authors(*SCHEDULES[name])
    assert config.train_cfg.max_epochs * ITERATIONS == len(expected)
    optimizer = _optimizer(config.optim_wrapper.optimizer.lr)
    wrapper = OptimWrapper(optimizer)
    schedulers = [PARAM_SCHEDULERS.build({"end": config.train_cfg.max_epochs, **scheduler},
                                         default_args={"optimizer": wrapper, "epoch_length": ITERATIONS})
                  for scheduler in config.param_scheduler]
    found = []
    for _ in range(config.train_cfg.max_epochs):
        for _ in range(ITERATIONS):
            found.append(_rates(optimizer))
            optimizer.step()
            [scheduler.step() for scheduler in schedulers if not scheduler.by_epoch]
        [scheduler.step() for scheduler in schedulers if scheduler.by_epoch]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# Of the files that the recipes name: images of all GPUs, drop path, decay, mixup, color jitter, random erasing, augmentation. The rest is
# theirs alike: cutmix 1, label smoothing 0.1; repeated augmentation by DeiT's heirs, of whom LITv2 and TAPADL are none.
RAND = "rand-m9-mstd0.5-inc1"
REGULARIZATION = {
    "attnet_xxs_in1k": (4096, 0.0, 0.015, 0.05, 0.0, 0.0, None), "attnet_xs_in1k": (4096, 0.02, 0.025, 0.1, 0.0, 0.0, None),
    "attnet_s_in1k": (4096, 0.05, 0.025, 0.3, 0.1, 0.0, RAND), "attnet_t1_in1k": (4096, 0.1, 0.025, 0.6, 0.2, 0.15, RAND),
    **{f"attnet_t{n}_in1k": (4096, path, 0.05, 0.8, 0.4, 0.25, RAND) for n, path in ((2, 0.2), (3, 0.4), (4, 0.5))},
    "biformer_tiny_in1k": (1024, 0.1, 0.05, 0.8, 0.4, 0.25, RAND), "biformer_small_in1k": (1024, 0.15, 0.05, 0.8, 0.4, 0.25, RAND),
    "lambda_deit_tiny_024_in1k": (2048, 0.1, 0.05, 0.8, 0.3, 0.25, RAND),
    **{f"litv2_{size}_in1k": (1024, path, 0.05, 0.8, 0.4, 0.25, RAND) for size, path in (("s", 0.2), ("m", 0.3), ("b", 0.5))},
    **{f"moh_transnext_{size}_in1k": (1024, path, 0.05, 0.8, 0.4, 0.25, RAND)
       for size, path in (("small_80", 0.45), ("small_75", 0.45), ("base_75", 0.6), ("base_50", 0.6))},
    "litv2_b_384_in1k": (1024, 0.5, 1e-8, 0.8, 0.4, 0.25, RAND),
    "tap_fan_base_16_p4_hybrid_in1k": (4096, 0.35, 0.05, 0.8, 0.4, 0.3, RAND),
}


@pytest.mark.parametrize("name", REGULARIZATION)
def test_regularization_is_the_authors(name):
    config = load_config(name)
    transform, mixup, optimizer = config.train_dataloader.dataset.transform, config.model.mixup, config.optim_wrapper.optimizer
    assert REGULARIZATION[name] == (
        config.auto_scale_lr.base_batch_size, config.model.args.drop_path_rate, optimizer.weight_decay, mixup.mixup_alpha,
        transform.color_jitter, transform.re_prob, transform.auto_augment)
    assert (mixup.cutmix_alpha, mixup.prob, mixup.switch_prob, config.model.label_smoothing) == (1.0, 1.0, 0.5, 0.1)
    assert config.train_dataloader.sampler.repeats == (1 if name.startswith(("litv2", "tap_fan")) else 3)
    norm = {"litv2": 5.0, "moh": 1.0}.get(name.split("_")[0])
    assert config.optim_wrapper.get("clip_grad") == (norm and {"max_norm": norm})


def test_recipes_that_say_that_they_are_the_authors_are_compared():
    said = {path.stem for path in (CONFIGS / "classification").glob("*.py")
            if re.search("The authors' (settings|fine-tuning)", path.read_text())}
    assert said and said <= REGULARIZATION.keys() & SCHEDULES.keys()


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("in1k")])
def test_the_best_checkpoint_is_by_all_that_is_reported(name):
    """TAPADL's is by the better of weights and average: of the two kept, one."""
    config = load_config(name)
    average = [hook for hook in config.custom_hooks if hook.type == "ModelEMAHook"]
    both = [hook.get("report") for hook in average] == ["both"]
    assert config.default_hooks.checkpoint.save_best == (["accuracy/top1", "accuracy/top1_ema"] if both else "accuracy/top1")
    assert both is name.startswith("tap_fan")


def test_the_cosine_lasts_as_long_as_the_run():
    """Also where the run is made shorter, and when it goes on from its state."""
    optimizer = _optimizer(1.0)
    make = lambda: WarmupCosineLR(optimizer, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01, end=5)  # noqa: E731
    scheduler = make()
    found = []
    for _ in range(8):
        found.append(_rates(optimizer)[0])
        optimizer.step(), scheduler.step()
        other = make()
        other.load_state_dict(scheduler.state_dict())
        scheduler = other
        for group, rate in zip(optimizer.param_groups, scheduler._get_value(), strict=True):
            group["lr"] = rate
    cosine = [0.01 + 0.99 * (1 + np.cos(np.pi * t / 5)) / 2 for t in (2, 3, 4)]
    np.testing.assert_allclose(found, [0.1, 0.55, *cosine, 0.01, 0.01, 0.01], rtol=1e-12)
    with pytest.raises(InputError, match="needs its end"):
        WarmupCosineLR(optimizer, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)


TEXTS = {path.relative_to(CONFIGS).as_posix(): path.read_text() for path in CONFIGS.rglob("*.py")}
NAMES = {Path(path).stem for path in TEXTS}


def _pattern(name: str) -> str:
    """A file's name without the size of the model, in small letters: biformer_small_best.pth → biformer_*_best.pth."""
    sizes = r"(?<=_)(nano|tiny|small|base|large|xxs|xs|s|m|b|t[1-4])(?=[_.])"
    return re.sub(sizes, "*", name.lower())


@pytest.mark.parametrize("path", sorted(TEXTS))
def test_what_a_config_names_exists(path):
    """In its code and in its comments: configs, the epochs that they reach, tools, and the authors' files, which a model's page has."""
    text = re.sub(r"https://github\.com/[^;)\n]*", "", TEXTS[path])  # files of others
    for name, epoch in re.findall(r"work_dirs/([^/\s]+)/epoch_(\d+)\.pth", text):
        assert name in NAMES and load_config(name).train_cfg.max_epochs == int(epoch), f"{name} does not end with epoch {epoch}"
    for name in re.findall(r"work_dirs/([^/\s]+)/", text) + re.findall(r"(?<![/:\w.-])[\w.-]+_(?:in1k|digits|coco|mni152)\b", text):
        assert name in NAMES, f"there is no config {name}"
    for name in re.findall(r"(?<![\w./'])(?:tools|configs|docs)/[\w./-]+", text):
        assert (ROOT / name.rstrip(".")).exists(), f"there is no {name}"
    documented = {_pattern(name) for source in (ROOT / "zoo" / "models").glob("*.py")
                  for name in re.findall(r"[\w.-]+\.pth(?:\.tar)?", source.read_text())}
    for name in re.findall(r"(?<!/)\b(?!epoch_)[\w.-]+\.pth(?:\.tar)?", text):
        assert _pattern(name) in documented, f"no page says what {name} is"


def test_configs_that_code_and_pages_name_exist():
    sources = [*ROOT.glob("*.md"), *(path for folder in ("zoo", "layers", "tools", "docs") for path in (ROOT / folder).rglob("*")
                                     if path.suffix in (".py", ".md"))]
    named = {(source.name, name) for source in sources for name in re.findall(r"\bconfigs/[\w./-]+\.py", source.read_text())}
    assert named and not [pair for pair in named if not (ROOT / pair[1]).exists()]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("in1k")])
def test_recipes_evaluate_as_their_models_ask(name):
    """Size, crop and interpolation of the authors' evaluation, in the recipe and in what timm knows of the model."""
    config = load_config(name)
    known, given = timm.get_pretrained_cfg(config.model.name), config.val_dataloader.dataset.transform
    assert given.input_size == known.input_size[-1] and given.interpolation == known.interpolation and given.crop_pct == known.crop_pct
    assert given.get("crop_mode") == ("squash" if "384" in name else None)
    assert config.test_dataloader == config.val_dataloader
    recorded = OnePicture(**given).data_config
    expected = timm.data.resolve_data_config(pretrained_cfg=known.to_dict())
    assert recorded == {key: expected[key] for key in recorded}
