"""Recipes of detectors and segmentors against the authors': rate, what decays, drop path, and how the rate goes."""
import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS

from zoo.mm.backbone import TimmBackbone
from zoo.mm.config import load_config, scope

FOLDER = Path(__file__).parents[2] / "configs"
MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
NEVER = r"(?!)"  # found in no name
ITERATIONS = 3000

# Of the authors' configs, which ours name: rate, decay, in which names of their code no decay is asked for, drop path; of segmentors
# iterations of warm-up and its first share, the curve that it is a factor of, that curve's last share, and its iterations. Detectors
# have the toolbox's schedule, as ours.
UPERNET = (1500, 1e-6, "poly", 1.0, 0.0, 160000)
AUTHORS = {
    **{f"{method}_biformer-{size}_fpn_1x_coco": (1e-4, 0.05, "norm", path, None)
       for method, size, path in (("mask-rcnn", "small", 0.2), ("mask-rcnn", "base", 0.3), ("cascade-mask-rcnn", "small", 0.2))},
    **{f"retinanet_biformer-{size}_fpn_1x_coco": (1e-4, 1e-4, NEVER, path, None) for size, path in (("small", 0.2), ("base", 0.3))},
    **{f"mask-rcnn_litv2-{size}_fpn_1x_coco": (2e-4, 1e-4, "norm", path, None) for size, path in (("s", 0.2), ("m", 0.2), ("b", 0.3))},
    **{f"retinanet_litv2-{size}_fpn_1x_coco": (1e-4, 1e-4, NEVER, path, None) for size, path in (("s", 0.2), ("m", 0.2), ("b", 0.3))},
    **{f"sem-fpn_biformer-{size}_8xb4-80k_ade20k-512x512": (2e-4, 1e-4, NEVER, path, (1000, 0.1, "cosine", None, 1e-8, 80000))
       for size, path in (("small", 0.15), ("base", 0.3))},
    **{f"upernet_biformer-{size}_8xb2-160k_ade20k-512x512": (6e-5, 0.01, "norm", path, UPERNET)
       for size, path in (("small", 0.3), ("base", 0.4))},
    **{f"sem-fpn_litv2-{size}_4xb4-80k_ade20k-512x512": (1e-4, 1e-4, NEVER, path, (0, 1.0, "poly", 0.9, 0.01, 80000))
       for size, path in (("s", 0.2), ("m", 0.2), ("b", 0.3))},
    "segformer_tap-fan-base_4xb1-160k_cityscapes-1024x1024": (6e-5, 0.01, "norm|pos_block", 0.0, UPERNET),
}


def _says_so(path: Path) -> bool:
    """Whether the config, or the one of ours that it is based on, says that its settings are the authors'."""
    text, base = path.read_text(), re.search(r"^_base_ = '\./(.+)'", path.read_text(), re.M)
    return "The authors' settings" in text or base is not None and _says_so(path.parent / base[1])


def test_every_recipe_that_says_that_it_is_the_authors_is_compared():
    paths = [path for folder in ("detection", "segmentation") for path in (FOLDER / folder).glob("*.py")]
    assert {path.stem for path in paths if _says_so(path)} == set(AUTHORS)


def _undecayed(model: torch.nn.Module, pattern: str) -> set[str]:
    """Parameters of `model` in whose names in the authors' code the pattern is found.

    The backbone's are those of their classifier, and of a norm for each map; heads and necks have the toolbox's names there, as here.
    """
    backbone = next(part for part in model.modules() if isinstance(part, TimmBackbone))
    state = json.loads((MANIFESTS / f"{backbone.name}.json").read_text())["state"]
    maps = {f"norm{i}.weight": norm.weight.shape for i, norm in enumerate(backbone.norms) if hasattr(norm, "weight")}
    names = {name: shape for name, shape in state.items() if not name.startswith("head.")}
    told = {f"backbone.{name}": torch.tensor(bool(re.search(pattern, name))).expand(shape) for name, shape in (names | maps).items()}
    backbone.take_authors_names(told, "backbone.")  # told by the values
    told |= {name: torch.tensor(bool(re.search(pattern, name))) for name, _ in model.named_parameters() if "backbone" not in name}
    told |= {name.replace("weight", "bias"): value for name, value in told.items() if ".norms." in name}
    own = dict(model.named_parameters())
    assert own.keys() <= told.keys()
    return {name for name in own if told[name].any()}


@pytest.mark.parametrize("name", AUTHORS)
def test_rate_decay_and_drop_path_are_the_authors(name):
    rate, decay, pattern, drop_path, _ = AUTHORS[name]
    config = load_config(name)
    assert config.model.backbone.args.drop_path_rate == drop_path
    with torch.device("meta"), scope(config):
        model = MODELS.build(config.model)
        optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.9, 0.999)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    undecayed = _undecayed(model, pattern)
    assert bool(undecayed) is (pattern != NEVER)
    for place, parameter in model.named_parameters():
        group = groups[id(parameter)]
        assert group["weight_decay"] == (0 if place in undecayed else decay), place
        assert group["lr"] == pytest.approx(rate * (10 if "tap-fan" in name and place.startswith("decode_head.") else 1)), place


def _authors_rate(t: int, warmup: int, first: float, curve: str, power: float | None, last: float, end: int) -> float:
    """Share of the rate at iteration t, by mmcv's hooks: the warm-up is a factor of what the curve is at that iteration."""
    share = (1 - t / end) ** power if curve == "poly" else (1 + math.cos(math.pi * t / end)) / 2
    return (last + (1 - last) * share) * (1 if t >= warmup else 1 - (1 - t / warmup) * (1 - first))


@pytest.mark.parametrize("name", [name for name, (*_, schedule) in AUTHORS.items() if schedule])
def test_rates_of_segmentors_are_the_authors(name):
    config = load_config(name)
    rate, *_, schedule = AUTHORS[name]
    assert config.train_cfg.max_iters == schedule[-1]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    wrapper = OptimWrapper(optimizer)
    schedulers = [PARAM_SCHEDULERS.build(dict(scheduler), default_args={"optimizer": wrapper}) for scheduler in config.param_scheduler]
    assert not any(scheduler.by_epoch for scheduler in schedulers)
    for t in range(ITERATIONS):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * _authors_rate(t, *schedule), rel=1e-6), t
        optimizer.step()
        [scheduler.step() for scheduler in schedulers]
