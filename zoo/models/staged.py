"""What timm asks of a hierarchical network, written once for the families of the zoo."""
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from timm.layers import ClassifierHead, NormMlpClassifierHead, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices  # private, and the only source of it: timm's own families use it
from torch import Tensor, nn

from zoo.layers._scripting import refuse_scripting


class StagedNetwork(nn.Module):
    """A stem, stages that each work at half the resolution of the one before, perhaps a norm, and a head.

    Families build, in their constructor, `stem`, `stages` (an `nn.Sequential` of modules with a flag `grad_checkpointing`),
    `head` (timm's, with `fc` and `reset`), `feature_info`, `in_chans`, `num_classes`, `num_features` and `head_hidden_size`, and call
    `init_weights(needs_reset=False)` at its end. There may be a `norm` between stages and head; one with another name or place is
    said by `final_norm` and `drop_norm`. There may be `coarser`: it makes one more map of the last stage's, which is a feature only.
    Weights of modules of the types in `truncated` come from a truncated normal distribution of deviation 0.02; their biases are 0.
    """

    truncated: tuple[type[nn.Linear | nn.Conv2d], ...] = ()
    __prepare_scriptable__ = refuse_scripting

    stem: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    coarser: nn.Module | None
    head: ClassifierHead | NormMlpClassifierHead
    feature_info: list[dict[str, Any]]
    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int | None

    def init_weights(self, needs_reset: bool = True) -> None:
        """Values of a new network, as in timm; `needs_reset` also for what modules give themselves when they are made."""
        if needs_reset:
            reset_parameters(self)
        for module in self.modules():
            if isinstance(module, self.truncated):
                truncated_normal_(module)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last stage, or what else leads from its features to the head's, if there is anything."""
        return self.norm(x) if hasattr(self, "norm") else x

    def drop_norm(self) -> None:
        """Puts an identity in the place of the last norm, wherever it is."""
        self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in cast(Iterable[Any], self.stages):
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        dd: dict[str, Any] = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.num_classes, self.head_hidden_size = num_classes, self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the stages that `indices` picks (the last n, or a list; all by default), as in timm.

        `norm` applies `final_norm` to those of the last stage.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        levels, final = self._levels(), len(self.stages) - 1
        indices, last = feature_take_indices(len(levels), indices)
        intermediates = []
        features = x = self.stem(x)
        for i, level in enumerate(levels[: last + 1] if stop_early else levels):
            x = level(x)
            if i in indices:
                intermediates.append(self.final_norm(x) if norm and i == final else x)
            if i <= final:
                features = x
        if intermediates_only:
            return intermediates
        return (self.final_norm(features) if i >= final else features), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last of `indices`, and the norm and head where asked."""
        indices, last = feature_take_indices(len(self._levels()), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if last < len(self.stages):
            self.coarser = None
        if prune_norm or pruned:
            self.drop_norm()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return indices

    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        coarser = getattr(self, "coarser", None)
        return [*self.stages] if coarser is None else [*self.stages, coarser]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.final_norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


if TYPE_CHECKING:
    class _Network(nn.Module):
        """What stands beside `Reinitialized` among the bases: a network of timm's with a method for its initialisation."""

        def init_weights(self, **options: Any) -> None: ...
else:
    _Network = object


class Reinitialized(_Network):
    """For classes of timm's networks, whose own `init_weights` leaves alone what modules give themselves when they are made.

    Here it also initialises storage that holds anything, as after `to_empty`: every parameter and buffer gets the values of a new
    network. Modules of the type `added` keep their own values, whatever timm's rules are for what they are made of.
    """

    added: type[nn.Module] | tuple[type[nn.Module], ...] = ()
    __prepare_scriptable__ = refuse_scripting
    _as_made: dict[str, Any] | None = None  # options of the constructor's own call

    def init_weights(self, *, needs_reset: bool = True, **options: Any) -> None:
        """Values of a new network; `options`: of timm's method, by default as in the constructor."""
        new = self._as_made is None
        if new:
            self._as_made = options
        elif needs_reset:
            reset_parameters(self)
        super().init_weights(**{**(self._as_made or {}), **options})
        if not new:
            for module in self.modules():
                if isinstance(module, self.added):
                    reset_parameters(module)


def truncated_normal_(module: nn.Linear | nn.Conv2d) -> None:
    """Weights from a truncated normal distribution of deviation 0.02; bias 0."""
    trunc_normal_(module.weight, std=0.02, a=-0.2, b=0.2)  # by rounding, one number in 2²⁴ gets the bound, by default -2
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def stochastic_depth(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates at which the blocks of every stage are left out, growing with depth from 0 to `rate`."""
    return cast(list[list[float]], calculate_drop_path_rates(rate, list(depths), stagewise=True))


def downsampling(stages: int, output_stride: int | None) -> list[tuple[int, int]]:
    """Of each of so many stages behind a stem of stride 4, the stride and what it comes to: 1 and 4, 2 and 8, 2 and 16, …

    With `output_stride`, 8, 16 or 32, no map gets coarser than that: stages that would make it so have stride 1, and more to do.
    """
    if output_stride not in (None, 8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16, 32 or None, got {output_stride!r}")
    found, reduction = [], 4
    for stage in range(stages):
        stride = 2 if stage and (output_stride is None or reduction < output_stride) else 1
        reduction *= stride
        found.append((stride, reduction))
    return found


def patch_conv(dim: int, out_dim: int, stride: int, **dd: Any) -> dict[str, nn.Module]:
    """A 2×2 convolution by its name `conv`, and with stride 1 before it what keeps the map's size."""
    pad: dict[str, nn.Module] = {} if stride == 2 else {"pad": nn.ZeroPad2d((0, 1, 0, 1))}
    return {**pad, "conv": nn.Conv2d(dim, out_dim, 2, stride, **dd)}


def reset_parameters(network: nn.Module) -> None:
    """The values that modules give their parameters and buffers when they are made, children first."""
    network.apply(_reset)


def _reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        cast(Any, module).reset_parameters()


def named(**modules: nn.Module) -> nn.Sequential:
    """A sequence whose modules have names."""
    return nn.Sequential(OrderedDict(modules))
