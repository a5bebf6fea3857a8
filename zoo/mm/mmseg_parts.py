"""Parts of segmentors that mmsegmentation does not have. Imported where a config or a checkpoint is of mmsegmentation."""
import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.models import EncoderDecoder, FCNHead, SegformerHead
from mmseg.models.losses import accuracy
from mmseg.registry import MODELS, TRANSFORMS
from torch import Tensor, nn

from zoo import AttentionDiversificationLoss, ConnectivityLoss
from zoo.errors import InputError
from zoo.layers.connectivity import class_logits, map_channels
from zoo.mm import toolbox_pictures  # noqa: F401  registered so
from zoo.reading.masks import MaskValues, read_picture_mask

IGNORED = 255


@TRANSFORMS.register_module()
class LoadLabels(LoadAnnotations):
    """Reads masks as `zoo.reading.masks` does, in the place of mmsegmentation's LoadAnnotations.

    `IGNORED` stands for no class, unless it is among `mask_values`.

    Args:
        classes: how many there are in the masks; training and testing fill it in. None for as many as there can be.
        mask_values: what stands for the classes in the masks, in their order; by default their numbers, 0, 1, …, after those of
            `reduce_zero_label` from 1 on.
        reduce_zero_label: as of LoadAnnotations.

    Raises InputError for a value that stands for no class, and for a mask that does not lie on its picture.
    """

    def __init__(self, classes: int | None = None, mask_values: Sequence[int] | None = None, reduce_zero_label: bool | None = None):
        super().__init__()
        self.reduced = reduce_zero_label
        self.mask_values = mask_values
        self.classes = len(mask_values) if mask_values else IGNORED if classes is None else classes
        if self.classes > IGNORED:
            raise InputError(f"mmsegmentation's masks have at most {IGNORED} classes, and there are {classes}")

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        reduced = results["reduce_zero_label"] if self.reduced is None else self.reduced
        labels = dict(zip(self.mask_values or range(reduced, self.classes + reduced), range(self.classes), strict=True))
        if reduced:
            labels.setdefault(0, IGNORED)
        labels.setdefault(IGNORED, IGNORED)
        renamed = results.get("label_map") or {}
        path = results["seg_map_path"]
        places = MaskValues(tuple(labels)).labels(read_picture_mask(path, results["img_path"]), path)
        results["gt_seg_map"] = np.array([renamed.get(label, label) for label in labels.values()], np.uint8)[places]
        results["seg_fields"].append("gt_seg_map")


@MODELS.register_module()
class LinearSegformerHead(SegformerHead):
    """SegFormer's head as FAN's and TAPADL's authors have it: a linear layer alone projects each map; only the fusion has norm and ReLU.

    NVlabs/FAN, segmentation/mmseg/models/decode_heads/segformer_head.py, and the same file in guoyongcs/TAPADL.

    Arguments as mmsegmentation's `SegformerHead`. `load_state_dict` of it, or of a network around it, also takes the authors' names.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convs = nn.ModuleList(ConvModule(width, self.channels, 1, act_cfg=None) for width in cast(list[int], self.in_channels))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest) -> None:
        self.take_authors_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def take_authors_names(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Gives what is under `prefix` in `state_dict` the names, and shapes, that it has here, if they are the authors'."""
        given = {name.removeprefix(prefix): state_dict[name] for name in [*state_dict] if name.startswith(prefix)}
        if "linear_fuse.conv.weight" not in given:
            return
        for name in given:
            del state_dict[prefix + name]
        for name, value in given.items():
            part, _, rest = name.partition(".")
            if part == "linear_fuse":
                if rest == "conv.weight":  # theirs puts the coarsest map first
                    value = value.unflatten(1, (len(self.convs), -1)).flip(1).flatten(1, 2)
                name = f"fusion_conv.{rest}"
            elif part == "linear_pred":
                name = f"conv_seg.{rest}"
            elif part.startswith("linear_c"):
                name = f"convs.{int(part[-1]) - 1}.{rest.replace('proj', 'conv')}"
                value = value[..., None, None] if value.ndim == 2 else value
            elif part == "conv_seg":  # of mmsegmentation's base class, which their head does not use
                continue
            state_dict[prefix + name] = value


class ConnectivityHead(FCNHead):
    """mmsegmentation's `FCNHead` whose last convolution puts out connections of neighbouring pixels: 8 for each class.

    Its subclasses say by which loss it learns. Predictions are logits of classes, of connections at the picture's size, as
    `zoo.layers.connectivity.class_logits` makes them; two classes are a background and a thing, whose 8 connections suffice.

    Args:
        votes: of `zoo.ConnectivityLoss`. Pixels of the label `ignore_index` do not count.

    Other arguments as `FCNHead`, but for losses, samplers of pixels, and `out_channels`, which are not there.
    """

    variant: Literal["bicon", "dconn"]

    def __init__(self, *, num_classes: int, votes: float = 0.2, **kwargs):
        refused = [name for name in ("loss_decode", "sampler", "out_channels", "threshold") if name in kwargs]
        if refused:
            raise InputError(f"{type(self).__name__} learns by its own loss, of all pixels and classes, and takes no {refused[0]}")
        if self.variant == "bicon" and num_classes != 2:
            raise InputError(f"{type(self).__name__} is for two classes, a background and a thing, and num_classes is {num_classes}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two classes would better have one channel, which here they have
            super().__init__(num_classes=num_classes, **kwargs)
        self.conv_seg = nn.Conv2d(self.channels, map_channels(num_classes), 1)
        self.connectivity_loss = ConnectivityLoss(self.variant, votes, ignore_index=self.ignore_index)

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
        labels = self._stack_batch_gt(batch_data_samples)[:, 0]
        maps = F.interpolate(seg_logits, labels.shape[1:], mode="bilinear", align_corners=self.align_corners)
        found = accuracy(class_logits(maps.detach(), self.num_classes), labels, ignore_index=self.ignore_index)
        return {f"loss_{self.variant}": self.connectivity_loss(maps, labels), "acc_seg": cast(Tensor, found)}

    def predict_by_feat(self, seg_logits: Tensor, batch_img_metas: list[dict]) -> Tensor:
        return class_logits(super().predict_by_feat(seg_logits, batch_img_metas), self.num_classes)


@MODELS.register_module()
class BiconHead(ConnectivityHead):
    """A `ConnectivityHead` for a thing and its background that learns by the loss of BiconNet (arXiv 2103.00334)."""

    variant = "bicon"


@MODELS.register_module()
class DconnHead(ConnectivityHead):
    """A `ConnectivityHead` for any number of classes that learns by the loss of DconnNet (arXiv 2304.00145)."""

    variant = "dconn"


@MODELS.register_module()
class DiversifiedEncoderDecoder(EncoderDecoder):
    """mmsegmentation's `EncoderDecoder`, trained with the attention diversification loss of its backbone (arXiv 2303.11126) as well.

    Args:
        attention_diversification: weight of `zoo.AttentionDiversificationLoss`.
        attention_threshold: its threshold.

    Other arguments as `EncoderDecoder`.
    """

    def __init__(self, *args, attention_diversification: float = 1.0, attention_threshold: float = 2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight, self.diversification = attention_diversification, AttentionDiversificationLoss(attention_threshold)

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        maps, similarity = self.diversification(self.backbone, inputs)
        maps = self.neck(maps) if self.with_neck else maps
        losses = self._decode_head_forward_train(maps, data_samples)
        if self.with_auxiliary_head:
            losses |= self._auxiliary_head_forward_train(maps, data_samples)
        return losses | {"loss_attention_diversification": self.weight * similarity}
