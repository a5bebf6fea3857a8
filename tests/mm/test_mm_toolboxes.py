"""Every config of detection and segmentation, found by listing: sound in itself, trained for a step, used once."""
import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from reduced import batch, meta_backbone, reduced

import zoo
from zoo.mm.backbone import TimmBackbone
from zoo.mm.config import load_config, scope

FOLDER = Path(__file__).parents[2] / "configs"


def _of_a_toolbox(path: Path) -> bool:
    base = re.search(r"^_base_ = '(.+)'", path.read_text(), re.M)
    return base is not None and ("::" in base[1] or _of_a_toolbox(path.parent / base[1]))


CONFIGS = [path for folder in ("detection", "segmentation") for path in sorted((FOLDER / folder).glob("*.py")) if _of_a_toolbox(path)]


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def config(request) -> Config:
    return load_config(request.param)


def test_the_best_checkpoint_is_kept_and_hooks_of_the_house_are_there(config):
    checkpoint = config.default_hooks.checkpoint
    assert checkpoint.save_best == ("coco/bbox_mAP" if config.default_scope == "mmdet" else "mIoU") and checkpoint.rule == "greater"
    assert {"IterationSeedHook", "FiniteHook", "ScreenHook", "RecordSceneHook"} <= {hook.type for hook in config.custom_hooks}


def _strides(backbone: TimmBackbone, neck: dict) -> list[int]:
    """Of the maps that the neck gives: an FPN halves on from the last map of the backbone."""
    strides = list(backbone.strides[neck.get("start_level", 0):])
    while len(strides) < neck.num_outs:
        strides.append(2 * strides[-1])
    return strides


def test_channels_strides_and_anchors_fit_the_backbone(config):
    model = config.model
    with scope(config):
        backbone = meta_backbone(config)
    assert model.backbone.name in zoo.list_models()
    readers = [head for head in (model.get("neck"), model.get("decode_head")) if head is not None]
    readers = [part for reader in readers[:1] for part in (reader if isinstance(reader, list) else [reader])]
    assert readers and all(tuple(reader.in_channels) == backbone.channels for reader in readers)
    if auxiliary := model.get("auxiliary_head"):
        assert auxiliary.in_channels == backbone.channels[auxiliary.in_index]
    if neck := model.get("neck"):
        strides = _strides(backbone, neck)
        for head in (model.get("rpn_head"), model.get("bbox_head")):
            if head is not None and "anchor_generator" in head:
                assert head.anchor_generator.strides == strides
        for name, extractor in (model.get("roi_head") or {}).items():
            if name.endswith("_extractor"):
                assert extractor.featmap_strides == strides[:4]
        if "feature_strides" in (model.get("decode_head") or {}):
            assert model.decode_head.feature_strides == strides
    elif model.get("decode_head"):
        assert backbone.strides == (4, 8, 16, 16 if model.backbone.get("args", {}).get("class_attention_map") else 32)


def test_trains_for_a_step_and_predicts(config):
    torch.manual_seed(0)
    small = reduced(Config(config.to_dict()))
    with scope(config):
        model = MODELS.build(small.model)
        model.init_weights()
        wrapper = build_optim_wrapper(model, small.optim_wrapper)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.train()
    losses = model.train_step(batch(config.default_scope), wrapper)
    assert losses["loss"].isfinite()
    changed = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name, _ in model.named_children() if list(getattr(model, name).parameters())} <= changed
    model.eval()
    sample = model.test_step(batch(config.default_scope, size=(80, 112), images=1))[0]
    if config.default_scope == "mmseg":
        assert sample.pred_sem_seg.data.shape == (1, 80, 112)
    else:
        found = sample.pred_instances
        assert found.bboxes.shape == (len(found), 4) and found.scores.isfinite().all()
        assert "mask_head" not in (small.model.get("roi_head") or {}) or found.masks.shape == (len(found), 80, 112)
