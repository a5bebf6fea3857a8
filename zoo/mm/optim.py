"""Parameter groups and schedules by timm's rules, and mixed precision on every device."""
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import timm.optim
import torch
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.mm.backbone import TimmBackbone


def param_groups(network: nn.Module, lr: float, weight_decay: float, layer_decay: float | None = None,
                 lr_multipliers: Mapping[str, float] | None = None, decay_multipliers: Mapping[str, float] | None = None,
                 around: nn.Module | None = None) -> list[dict]:
    """Groups of the trainable parameters of a timm model, with their learning rate and weight decay.

    Norms, biases (all parameters of one dimension) and what `network.no_weight_decay()` names are not decayed. With
    `layer_decay` d, the learning rate of the layer that is the i-th from the end by `network.group_matcher` is d^i of
    that of the head. `lr_multipliers` maps regular expressions to factors; the first that is found in a parameter's
    name applies. `decay_multipliers` does the same to the decay, in place of the rule above: without any, {}, all parameters are
    decayed. `around` is a detector or segmentor whose backbone `network` is: its other parameters come as well, as
    one more layer at the end.
    """
    options = {"weight_decay": weight_decay, "no_weight_decay_list": getattr(network, "no_weight_decay", set)()}
    if layer_decay is None:
        groups = timm.optim.param_groups_weight_decay(network, **options)
    else:
        groups = timm.optim.param_groups_layer_decay(network, layer_decay=layer_decay, **options)
    names = {parameter: name for name, parameter in network.named_parameters()}
    if around is not None:
        for group in groups:
            group["lr_scale"] = group.get("lr_scale", 1.0) * (layer_decay or 1.0)
        others = {parameter: name for name, parameter in around.named_parameters() if parameter not in names and parameter.requires_grad}
        names |= others
        groups += [{"params": [parameter], "weight_decay": weight_decay if parameter.ndim > 1 else 0.0} for parameter in others]
    split: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            factor = group.get("lr_scale", 1.0) * _multiplier(names[parameter], lr_multipliers or {})
            decay = group["weight_decay"]
            if decay_multipliers is not None:
                decay = weight_decay * _multiplier(names[parameter], decay_multipliers)
            split.setdefault((factor, decay), []).append(parameter)
    return [{"params": params, "lr": lr * factor, "weight_decay": decay} for (factor, decay), params in split.items()]


def _multiplier(name: str, multipliers: Mapping[str, float]) -> float:
    return next((factor for pattern, factor in multipliers.items() if re.search(pattern, name)), 1.0)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """Builds the optimizer over `param_groups`; `paramwise_cfg` holds its `layer_decay`, `lr_multipliers`, `decay_multipliers`."""

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop("optimizer"))
        self.options = dict(paramwise_cfg or {})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)
        backbone = next((part for part in model.modules() if isinstance(part, TimmBackbone)), None)
        network, around = (getattr(model, "model", model), None) if backbone is None else (backbone.network, model)
        try:
            groups = param_groups(
                network, self.optimizer["lr"], self.optimizer.get("weight_decay", 0.0), around=around, **self.options)
        except TypeError as error:
            raise InputError(f"optim_wrapper.paramwise_cfg: {error}") from error
        optimizer = OPTIMIZERS.build({**self.optimizer, "params": groups})
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper", **self.wrapper, "optimizer": optimizer})


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    """timm's cosine over a whole run of T epochs, whose first epochs a linear warm-up takes the place of.

        lr(t) = w + (lr − w) t / T_w                             t < T_w
        lr(t) = m + (lr − m) (1 + cos(π t / T)) / 2              T_w ≤ t < T
        lr(t) = m                                                T ≤ t

    The rates w and m are the same for every group of parameters, whatever its own is, and batches do not scale them.

    Args:
        warmup_epochs: T_w.
        warmup_lr: w.
        min_lr: m.
        lag: steps that the rate stays behind, t = max(0, steps − lag): 1 where a loop sets it after a step, by the number of the step
            that is over, as that of DeiT's authors does (facebookresearch/deit, main.py) and those made of it.
        begin, end: T = end − begin; `end` is by default the number of epochs.

    Constant within an epoch; with `convert_to_iter_based` as the engine takes it, it moves at every iteration, and the lag is one.
    """

    def __init__(self, optimizer: OptimWrapper, warmup_epochs: float, warmup_lr: float, min_lr: float, lag: int = 0,
                 begin: int = 0, end: int = INF, last_step: int = -1, by_epoch: bool = True, verbose: bool = False):
        if end >= INF:
            raise InputError("WarmupCosineLR needs its end, the number of epochs that the cosine lasts")
        self.warmup, self.warmup_lr, self.min_lr, self.lag, self.period = warmup_epochs, warmup_lr, min_lr, lag, end - begin
        super().__init__(optimizer, begin=begin, last_step=last_step, by_epoch=by_epoch, verbose=verbose)

    @classmethod
    def build_iter_from_epoch(cls, *args, warmup_epochs: float, end: int, epoch_length: int, begin: int = 0, by_epoch: bool = True,
                              **kwargs) -> "WarmupCosineLR":
        """The same in iterations, `epoch_length` an epoch."""
        return cls(*args, warmup_epochs=warmup_epochs * epoch_length, begin=begin * epoch_length, end=end * epoch_length, by_epoch=False,
                   **kwargs)

    def _get_value(self) -> list[float]:
        t = max(0, self.last_step - self.lag)
        if t < self.warmup:
            return [self.warmup_lr + (lr - self.warmup_lr) * t / self.warmup for lr in self.base_values]
        share = (1 + math.cos(math.pi * t / self.period)) / 2 if t < self.period else 0.0
        return [self.min_lr + (lr - self.min_lr) * share for lr in self.base_values]


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Mixed precision on CPU and GPU: the forward pass under autocast, the optimizer in float32.

    `dtype` is "bfloat16", "float16" (with dynamic loss scaling; GPU only) or None: bfloat16 where the device has it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, dtype: str | None = None, accumulative_counts: int = 1,
                 clip_grad: dict | None = None):
        super().__init__(optimizer, accumulative_counts=accumulative_counts, clip_grad=clip_grad)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = "bfloat16" if self.device == "cpu" or torch.cuda.is_bf16_supported() else "float16"
        if dtype not in ("bfloat16", "float16") or (dtype == "float16" and self.device == "cpu"):
            raise InputError(f"mixed precision in {dtype!r} on {self.device}: use 'bfloat16', or 'float16' on a GPU")
        self.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(self.device, enabled=dtype == "float16")

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(self.device, self.dtype):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        super().backward(self.scaler.scale(loss), **kwargs)

    def step(self, **kwargs) -> None:
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "loss_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        if scale := state_dict.pop("loss_scaler", None):
            self.scaler.load_state_dict(scale)
        super().load_state_dict(state_dict)
