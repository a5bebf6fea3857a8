"""What is compared before anything is trained or tested: data with data, with the model, and with what a checkpoint was trained on."""
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from torch import nn

from zoo.errors import InputError
from zoo.mm.backbone import TimmBackbone
from zoo.reading.masks import MaskValues
from zoo.reading.pictures import files_below


def build_dataset(part: str, config: Any) -> Any:
    """The dataset of `config`. Raises InputError for one of the engine's that is empty."""
    try:
        return DATASETS.build(config)
    except ValueError as error:
        if "need at least one array" not in str(error):  # the engine's joining of what there is to read
            raise
        raise InputError(_empty(part, config)) from error


def check_dataset(part: str, config: Any, dataset: Any, evaluators: Sequence[Mapping]) -> None:
    """Raises InputError for a dataset, built of `config`, that holds nothing, or not what its toolbox and the evaluators need.

    Settles what stands for the classes in the masks of a mmsegmentation dataset: it is written into `config`.
    """
    classes = dataset.metainfo["classes"]
    if isinstance(classes, str):
        raise InputError(f"the classes of the {part} data are {classes!r}, one text; a list of one name has a comma: ({classes!r},)")
    if (not hasattr(dataset, "full_init") or getattr(dataset, "_fully_initialized", False)) and not len(dataset):  # others list files later
        raise InputError(_empty(part, config))
    for described, leaf in _leaves(config, dataset):
        if hasattr(leaf, "seg_map_suffix") and hasattr(leaf, "label_map"):
            _settle_masks(part, described, leaf)
    if part != "train" and hasattr(dataset, "COCOAPI") and not any(metric.get("format_only") for metric in evaluators) and not any(
            dataset.get_data_info(index)["instances"] for index in range(len(dataset))):
        raise InputError(f"nothing can be measured on the {part} data: {dataset.ann_file} has no annotation of a class")
    for metric in evaluators:
        file, own = metric.get("ann_file"), getattr(dataset, "ann_file", None)
        if file and own and hasattr(dataset, "COCOAPI") and Path(file).resolve() != Path(own).resolve():
            raise InputError(f"{part}_evaluator.ann_file is {file}, and the {part} data are those of {own}")


def check_channels(model: nn.Module) -> None:
    """Raises InputError unless the neck, or each head, of a toolbox's model takes the maps that its backbone gives."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, TimmBackbone):
        return
    given = backbone.channels
    if (neck := getattr(model, "neck", None)) is not None:
        parts = [("neck", neck)]
    else:
        parts = [(name, head) for name in ("decode_head", "auxiliary_head") for head in _each(getattr(model, name, None))]
    for name, part in parts:
        taken = getattr(part, "in_channels", None)
        index = getattr(part, "in_index", None)
        if isinstance(taken, int):
            expected = given[index] if isinstance(index, int) and -len(given) <= index < len(given) else None
        else:
            expected = [given[place] for place in index] if isinstance(index, list | tuple) else list(given)
        if taken is not None and expected is not None and (taken if isinstance(taken, int) else list(taken)) != expected:
            raise InputError(f"the backbone {backbone.name} gives maps of {', '.join(map(str, given))} channels, and the {name} takes "
                             f"{taken}; set model.{name}.in_channels={str(expected).replace(' ', '')}")


def check_channels_of_data(model: nn.Module, part: str, dataset: Any) -> None:
    """Raises InputError unless a network that says how many channels it takes gets as many."""
    taken = getattr(getattr(model, "model", None), "in_chans", None)
    given = (getattr(dataset, "data_config", None) or {}).get("input_size", [None])[0]
    if None not in (taken, given) and taken != given:
        raise InputError(f"the model takes {taken} channels, the {part} data have {given}; set model.args.in_chans")


def _settle_masks(part: str, config: Any, dataset: Any) -> None:
    items = [dataset.get_data_info(index) for index in range(len(dataset))]
    masks = [Path(item["seg_map_path"]) for item in items if item.get("seg_map_path")]
    if missing := [item for item in items if not Path(item.get("seg_map_path") or "").is_file()]:
        raise InputError(f"{len(missing)} of the {len(items)} pictures of the {part} data have no mask, such as {missing[0]['img_path']}, "
                         f"whose mask would be {missing[0].get('seg_map_path')}; data_prefix, img_suffix and seg_map_suffix say how they "
                         "are called")
    folder = dataset.data_prefix.get("seg_map_path")
    if folder and not dataset.ann_file:
        known = set(masks)
        if extra := [path for path in files_below(folder, (dataset.seg_map_suffix.lower(),)) if path not in known]:
            raise InputError(f"{len(extra)} masks of the {part} data have no picture, such as {extra[0]}")
    for step in config.get("pipeline", ()):
        if step.get("type") == "LoadLabels":
            step["classes"] = classes = len(dataset.label_map or dataset.metainfo["classes"])
            given, renumbered = step.get("mask_values"), dataset.label_map or dataset.reduce_zero_label
            values = MaskValues.of(classes, [] if renumbered else masks, given).stored
            step["mask_values"] = None if values == tuple(range(classes)) else list(values)


def _leaves(config: Any, dataset: Any) -> Iterator[tuple[Any, Any]]:
    """A dataset, or those that it wraps, with what it is built of."""
    if hasattr(dataset, "datasets") and "datasets" in config:
        for described, inner in zip(config["datasets"], dataset.datasets, strict=True):
            yield from _leaves(described, inner)
    elif hasattr(dataset, "dataset") and "dataset" in config:
        yield from _leaves(config["dataset"], dataset.dataset)
    else:
        yield config, dataset


def _empty(part: str, config: Mapping) -> str:
    prefix = config.get("data_prefix") or {}
    places = [config.get(name) for name in ("root", "data_root", "ann_file")] + list(prefix.values())
    where = " ".join(str(place) for place in places if place) or f"a {config.get('type')}"
    out = "; val_dataloader=None val_cfg=None val_evaluator=None leaves validation out" if part == "val" else ""
    return f"the {part} data are empty: there is nothing to read in {where}{out}"


def _each(head: Any) -> list[nn.Module]:
    return [] if head is None else list(head) if isinstance(head, nn.ModuleList) else [head]
