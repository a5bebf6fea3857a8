"""timm's way of building a model, with weights chosen, named and checked by the rules of `zoo.weights`."""
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import timm
import timm.models
from torch import Tensor, nn

from zoo import downloads
from zoo.weights import Filter, check_fit, converted, weights_in

__all__ = ["build_model_with_cfg", "is_dense", "names_weights"]

Model = TypeVar("Model", bound=nn.Module)
ELSEWHERE = "zoo: the weights are read when the model is there"  # the one entry of what timm takes for the state dict until then


def build_model_with_cfg(model_cls: type[Model], variant: str, pretrained: bool, pretrained_cfg: Any = None,
                         pretrained_cfg_overlay: Mapping[str, Any] | None = None, pretrained_filter_fn: Filter | None = None,
                         cache_dir: Any = None, **kwargs: Any) -> Model:
    """timm.models.build_model_with_cfg, but files are read by `zoo.weights` and addresses by `zoo.downloads`.

    The overlay may hold, beside timm's fields, `ema`: whether the file's average of the weights is loaded. What the file holds says
    how many classes and channels its weights are for, not the config: a head that fits is kept.

    Raises InputError for files without weights of this model, and for addresses of weights whose licence has to be accepted first.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    ema = overlay.pop("ema", False)
    cfg = timm.models.resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    source: str | Mapping[str, Any] | None = None
    if pretrained and cfg.source not in ("hf-hub", "local-dir"):  # timm's order of sources
        source = cfg.state_dict or cfg.file
        if not source and not cfg.hf_hub_id and isinstance(cfg.url, str):
            source = str(downloads.fetch(cfg.url, variant, licence=cfg.license, cache_dir=cache_dir))
    if source:
        cfg = dataclasses.replace(cfg, state_dict={ELSEWHERE: True})

    def convert(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        return _weights(content if source is None else source, model, pretrained_filter_fn, ema, bool(kwargs.get("features_only")))

    model = timm.models.build_model_with_cfg(
        model_cls, variant, pretrained, cfg.to_dict(), pretrained_filter_fn=convert, cache_dir=cache_dir, **kwargs)
    if source:
        del cast(dict[str, Any], model.pretrained_cfg)["state_dict"]
    return model


def _weights(source: str | Mapping[str, Any], model: nn.Module, filter_fn: Filter | None, ema: bool, features: bool) -> dict[str, Tensor]:
    """The model's weights, of which timm has yet to fit the first convolution to other channels and to drop a head of other classes."""
    cfg = cast(dict[str, Any], model.pretrained_cfg)
    given = weights_in(source, ema, own=model.state_dict(), licence=cfg.get("license"))
    weights = dict(converted(given, model, filter_fn))
    heads, stems = _names(cfg.get("classifier")), _names(cfg.get("first_conv"))
    rows = {len(weights[name]) for name in heads if name in weights}
    if len(rows) == 1:
        cfg["num_classes"] = rows.pop()
    for name in stems:
        if name in weights and weights[name].ndim == 4 and model.get_parameter(name).shape[1] == getattr(model, "in_chans", None):
            cfg["input_size"] = (weights[name].shape[1], *cfg["input_size"][1:])
    other_head = features or getattr(model, "num_classes", cfg["num_classes"]) != cfg["num_classes"]
    check_fit(weights, given, model, filter_fn, source if isinstance(source, str) else "the state dict",
              free=[*heads, *(name.removesuffix("weight") + "bias" for name in heads)] if other_head else (),
              resized=[name for name in stems if name in weights and weights[name].ndim == 4])
    return weights


def _names(modules: str | tuple[str, ...] | None) -> list[str]:
    """The weights of one module or several."""
    return [f"{module}.weight" for module in ([modules] if isinstance(modules, str) else modules or ())]


def names_weights(kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of a model name weights of the whole network: in a file, in a saved folder or on the hub."""
    cfgs = kwargs.get("pretrained_cfg_overlay"), kwargs.get("pretrained_cfg")
    return any(cfg.get(source) for cfg in cfgs if isinstance(cfg, dict) for source in ("file", "hf_hub_id", "state_dict", "url"))


def is_dense(name: str) -> bool:
    """Whether the answer of the registered model of this name is a map: its family says so by `DENSE`."""
    return getattr(sys.modules[timm.model_entrypoint(name).__module__], "DENSE", False)
