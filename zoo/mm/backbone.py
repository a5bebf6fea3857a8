"""Any hierarchical model of the zoo or of timm as the backbone of a detector or segmentor."""
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import group_modules, group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import InputError
from zoo.mm.networks import create_network, plain
from zoo.weights import load_weights as load_whole

STRIDES = (4, 8, 16, 32)
AUTHORS_NORM = re.compile(r"^(?:norm|extra_norms\.)(\d)\.")  # of a map: LITv2's and BiFormer's detectors and segmentors


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """Feature maps of a timm model at several strides: (B, C, H, W) → a tuple of (B, `channels[i]`, ⌈H/s⌉, ⌈W/s⌉), s = `strides[i]`.

    Without the model's head and last norm. Any model with timm's `forward_intermediates` will do. A map that a timm model
    rounds to another size than ⌈H/s⌉ is the model's own.

    Args:
        name: a name registered with timm.
        args: further arguments of `timm.create_model`, such as `drop_path_rate` or `in_chans`.
        out_indices: which of the model's feature maps, in the numbering of its `feature_info`; None for the last ones at
            strides 4, 8, 16 and 32.
        out_norm: a LayerNorm over the channels of every map, which transformers need whose blocks normalise their input only; or of
            some, by their places among the maps that are given.
        norm_eps: of those norms.
        checkpoint: the authors' released file (`zoo.models.released`), as `pretrained_cfg_overlay=dict(file=...)` takes it, or a
            checkpoint of `zoo train`. Read when training starts; what evaluates or resumes does not need it.
        ema: of that file the average of the weights instead of the weights that its authors evaluated.
        frozen_stages: how many parts of the model, as timm's `group_matcher(coarse=True)` divides it, keep their weights and
            work as in evaluation: 0 none, 1 the stem, 2 the stem and the first stage, …
        norm_eval: batch norms keep their running statistics in training.
        grad_checkpointing: recompute activations in the backward pass instead of keeping them.
        own_size: pictures go through the model one by one at their own size, and their maps are padded with zeros afterwards, so
            that what is seen in a picture does not depend on how the toolbox pads it. Own is what remains without the rows at the
            bottom and the columns at the right that are zero, as the toolboxes pad. Without it padding is a part of the picture
            like any other: convolutions see it close to the border; attention, regions and pooling of the whole map everywhere.

    `load_state_dict` of it, or of a network around it, also takes the names that the authors' detectors and segmentors have
    (tests/mm/test_mm_released.py).

    Raises InputError for an unknown name, an argument that the model does not take, or a checkpoint that does not fit.
    """

    def __init__(self, name: str, args: Mapping | None = None, out_indices: Sequence[int] | None = None,
                 out_norm: bool | Sequence[int] = False, norm_eps: float = 1e-6, checkpoint: str | None = None, frozen_stages: int = 0,
                 norm_eval: bool = False, grad_checkpointing: bool = False, own_size: bool = False,
                 ema: bool = False):
        super().__init__()
        self.ema = ema
        self.name, self.args, self.checkpoint, self.norm_eval, self.own_size = name, plain(args or {}), checkpoint, norm_eval, own_size
        self.network = create_network(name, self.args)
        if not hasattr(self.network, "forward_intermediates"):
            raise InputError(f"model {name} gives no feature maps: it has no forward_intermediates")
        info = self.network.feature_info
        if out_indices is None:
            last = {level["reduction"]: index for index, level in enumerate(info)}
            out_indices = [last[stride] for stride in STRIDES if stride in last]
        elif max(out_indices) >= len(info):
            raise InputError(f"out_indices={tuple(out_indices)}: {name} has {len(info)} feature maps")
        self.channels = tuple(info[index]["num_chs"] for index in out_indices)
        self.strides = tuple(info[index]["reduction"] for index in out_indices)
        self.out_indices = self.network.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.network.set_grad_checkpointing(grad_checkpointing)
        places = range(len(self.channels))
        normed = out_norm if isinstance(out_norm, Sequence) else places if out_norm else ()
        if not set(normed) <= set(places):
            raise InputError(f"out_norm={tuple(normed)}: there are {len(self.channels)} maps, from 0")
        self.norms = nn.ModuleList(
            LayerNorm2d(width, eps=norm_eps) if place in normed else nn.Identity() for place, width in enumerate(self.channels))
        self._freeze(frozen_stages)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest) -> None:
        self.take_authors_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def take_authors_names(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Gives what is under `prefix` in `state_dict` the names, and shapes, that it has here, if they are the authors'."""
        given = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        family = sys.modules[type(self.network).__module__]
        if not given or not hasattr(family, "checkpoint_filter_fn") or any(name.startswith(("network.", "norms.")) for name in given):
            return
        norms = {name for name in given if AUTHORS_NORM.match(name)}
        network = family.checkpoint_filter_fn({name: value for name, value in given.items() if name not in norms}, self.network)
        for name in given:
            del state_dict[prefix + name]
        state_dict.update({f"{prefix}network.{name}": value for name, value in network.items()})
        state_dict.update({prefix + AUTHORS_NORM.sub(r"norms.\1.", name): given[name] for name in norms})

    def _freeze(self, parts: int) -> None:
        matcher = self.network.group_matcher(coarse=True)
        groups = group_parameters(self.network, matcher)
        self.parts = len(groups)
        if not 0 <= parts <= len(groups):
            raise InputError(f"frozen_stages={parts}: {self.name} has {len(groups)} parts, the stem included")
        frozen = {name for part in range(parts) for name in groups[part]}
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in frozen)
        modules = group_modules(self.network, matcher)
        self.frozen = [name for part in range(parts) for name in modules[part]]  # names: synchronised batch norms take others' places

    def train(self, mode: bool = True) -> "TimmBackbone":
        super().train(mode)
        for name in self.frozen:
            self.network.get_submodule(name).eval()
        if self.norm_eval:
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Loads the checkpoint, if there is one; timm has initialised the model, and the engine would do so again."""
        if self.checkpoint is not None:
            load_weights(self.network, self.name, self.args, self.checkpoint, self.ema)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.own_size:
            return self._maps(x)
        alone = [self._maps(own_part(picture)[None]) for picture in x]
        sizes = [[-(-length // stride) for length in x.shape[2:]] for stride in self.strides]
        return tuple(torch.cat([F.pad(features, (0, width - features.shape[3], 0, height - features.shape[2])) for features in level])
                     for level, (height, width) in zip(zip(*alone, strict=True), sizes, strict=True))

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.network.forward_intermediates(x, indices=self.out_indices, intermediates_only=True)
        # mmcv's RoIAlign reads memory as (B, C, H, W) whatever the strides say
        return tuple(norm(features).contiguous() for norm, features in zip(self.norms, maps, strict=True))


def own_part(picture: Tensor) -> Tensor:
    """`picture` (C, H, W) without the rows at its bottom and the columns at its right that are zero; all of it if it is zero."""
    filled = (picture != 0).any(0)
    if not filled.any():
        return picture
    height, width = (int(filled.any(axis).nonzero()[-1]) + 1 for axis in (1, 0))
    return picture[:, :height, :width]


def load_weights(network: nn.Module, name: str, args: Mapping, path: str | Path, ema: bool = False) -> None:
    """Loads into `network`, a `name` created with `args` and without its head, the authors' or our own checkpoint at `path`.

    `ema`: the average of its weights, see `zoo.weights_in`. Raises InputError unless every weight of `network` is there.
    """
    whole = timm.create_model(name, **{**args, "num_classes": 0})
    try:
        load_whole(whole, path, ema, new_head=True)
    except InputError as error:
        raise InputError(f"{path} is not a checkpoint of {name}: {error}") from error
    weights = whole.state_dict()
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
