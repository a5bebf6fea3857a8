"""Configs of detectors and segmentors made small, all by the same rules, and something to train them on."""
import os

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

import zoo
from zoo.mm.config import change_texts, scope

WIDTHS = {"channels", "ocr_channels", "in_channels", "out_channels", "feat_channels", "conv_out_channels", "fc_out_channels"}
SHRINK = 8
KEPT = {"attn_args", "class_attention_map"}


def reduced(config: Config) -> Config:
    """The smallest model of the zoo with the longest common name in place of the backbone, and heads of an eighth of their width.

    Heads read the new backbone's channels where they read the old one's, and the backbone keeps what it is told of attention.
    Transformers keep their width, which their heads take for granted.
    """
    model = config.model
    name = model.backbone.name
    smallest = max(zoo.list_models("*nano*"), key=lambda nano: (len(os.path.commonprefix([name, nano])), -len(nano)))
    with scope(config):
        old = meta_backbone(config).channels
        model.backbone.args = ConfigDict({key: value for key, value in model.backbone.get("args", {}).items() if key in KEPT})
        model.backbone.name = smallest
        new = meta_backbone(config).channels
    if "num_queries" in model:
        model.num_queries = 100  # no more than there are positions in a small picture
    if "size" in model.data_preprocessor:
        model.data_preprocessor.update(size=None, size_divisor=32)
    for key in ("neck", "rpn_head", "roi_head", "bbox_head", "decode_head", "auxiliary_head"):
        if key in model:
            model[key] = _shrunk(model[key], old, new, 1 if "encoder" in model else SHRINK)
    change_texts(config, lambda text: "BN" if text == "SyncBN" else text)
    return config


def _shrunk(value: object, old: tuple[int, ...], new: tuple[int, ...], factor: int) -> object:
    if isinstance(value, list | tuple):
        return type(value)(_shrunk(item, old, new, factor) for item in value)
    if not isinstance(value, dict):
        return value
    result = {key: _shrunk(item, old, new, factor) for key, item in value.items()}
    for key in WIDTHS & value.keys():
        if value[key] == list(old):
            result[key] = list(new)
        elif isinstance(value[key], list):
            result[key] = [width // factor for width in value[key]]
        elif key == "in_channels" and isinstance(value.get("in_index"), int):
            result[key] = new[value["in_index"]]
        elif isinstance(value[key], int):
            result[key] = value[key] // factor
    return result


def meta_backbone(config: Config) -> torch.nn.Module:
    """The backbone without memory for its weights."""
    with torch.device("meta"):
        return MODELS.build(config.model.backbone)


def batch(toolbox: str, size: tuple[int, int] = (96, 128), images: int = 2) -> dict:
    """Noise with an object in each image, as the toolbox's pipelines give it."""
    height, width = size
    top, left, bottom, right = height // 4, width // 4, height // 2, width // 2
    meta = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "img_id": 0, "flip": False}
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8) for _ in range(images)]
    samples = []
    for _ in range(images):
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, top:bottom, left:right] = 1
        if toolbox == "mmdet":
            from mmdet.structures import DetDataSample
            from mmdet.structures.bbox import HorizontalBoxes
            from mmdet.structures.mask import BitmapMasks
            from mmengine.structures import InstanceData
            sample = DetDataSample(metainfo=meta)
            sample.gt_instances = InstanceData(
                bboxes=HorizontalBoxes(torch.tensor([[left, top, right, bottom]], dtype=torch.float32)), labels=torch.tensor([1]),
                masks=BitmapMasks(mask.numpy(), height, width))
        else:
            from mmengine.structures import PixelData
            from mmseg.structures import SegDataSample
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=mask.long())
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}
