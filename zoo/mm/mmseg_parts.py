"""Parts of segmentors that mmsegmentation does not have. Imported where a config or a checkpoint is of mmsegmentation."""
from typing import cast

from mmcv.cnn import ConvModule
from mmseg.models import EncoderDecoder, SegformerHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from zoo import AttentionDiversificationLoss


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
