"""Rows of model files that name what zoo has, as Ultralytics' parser takes them.

The parser reads a row as [from, repeats, name, arguments], looks the name up among the globals of its module, and an argument that is
the name of one of its own variables there: `ch`, the widths of all rows so far, and `c2`, the width of the row before. Of classes that it
does not know it takes the output to be as wide as the input; the first argument of convolutions it takes for their width, scales that with
the size of the model, and puts the width of the input before it.
"""
import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import timm
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv

import zoo.layers
from zoo.attach import attach
from zoo.errors import InputError, near_misses

from .modules import GATES, LAYERS, OUT_WIDTH, Backbone, Layer

Parser = Callable[..., tuple[nn.Sequential, list[int]]]
FEATURE_MAP, BACKBONE = "FeatureMap", "zoo.yolo.Backbone"


class Row(type):
    """The type of what the parser finds under a name: a class as it wants, that is called for a `Layer`."""

    def __call__(cls, *given: Any) -> nn.Module:
        *widths, args = given
        if isinstance(widths[0], list):
            ch, rows = widths
            widths = [ch[row] for row in rows]
        return Layer(cls.__name__, *widths, **args)


class ConvRow(Row):
    """The same for layers whose output has a width of its own. The parser is to treat it as it does a convolution, so it equals one."""

    def __call__(cls, dim: int, out: int, args: dict[str, Any]) -> nn.Module:
        return Layer(cls.__name__, dim, **{OUT_WIDTH[cls.__name__]: out}, **args)

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is Conv

    def __hash__(cls) -> int:
        return hash(Conv)


class BackboneRow(type):
    """The same for a network that is already built, since other rows ask for its widths."""

    def __call__(cls, built: "Built") -> nn.Module:
        return built.backbone


class Built:
    """A backbone as an argument, which the parser prints."""

    def __init__(self, name: str, backbone: Backbone):
        self.name, self.backbone = name, backbone

    def __repr__(self) -> str:
        return self.name


def wide(name: str) -> str:
    return f"zoo.yolo.{name}"


NAMES: dict[str, type] = {name: Row(name, (nn.Module,), {"__module__": "zoo.layers"}) for name in LAYERS}
NAMES |= {wide(name): ConvRow(name, (nn.Module,), {"__module__": "zoo.layers"}) for name in OUT_WIDTH}
NAMES[BACKBONE] = BackboneRow("Backbone", (nn.Module,), {"__module__": "zoo.yolo"})


def parser_of(original: Parser) -> Parser:
    """Ultralytics' parser, with zoo's names beside its own."""

    def parse_model(d: dict[str, Any], ch: int, verbose: bool = True) -> tuple[nn.Sequential, list[int]]:
        d = deepcopy(d)
        rows = Rows(d["backbone"] + d["head"])
        model, save = original(d, ch, verbose)
        return rows.finish(model, save, verbose)

    return parse_model


class Rows:
    """The rows of a file, which this turns into such as the parser takes, and what is left to do when it has."""

    def __init__(self, rows: list[list[Any]]):
        self.backbones: dict[int, Backbone] = {}
        self.sources: dict[int, list[int]] = {}
        self.attached: dict[int, tuple[str, dict[str, Any]]] = {}
        for number, row in enumerate(rows):
            self._translate(number, row)

    def _translate(self, number: int, row: list[Any]) -> None:
        source, repeats, name, args = row
        where = f"row {number} of the model, {name}"
        if "+" in name:
            row[2], layer = name.split("+", 1)
            if row[2] in LAYERS or not self._check_known(number, row[2]):
                raise InputError(f"{where}: before the + is a block of Ultralytics, such as C3k2, and {row[2]} is none")
            row[3], given = _split(args)
            self.attached[number] = layer, _bound(where, layer, [], given, ("keep_outputs", "where"))
        elif name in LAYERS:
            self._translate_layer(number, row, _bound(where, name, *_split(args)))
        elif name == FEATURE_MAP:
            row[2:] = "Index", self._feature_map(where, number, source, args)
        elif not self._check_known(number, name):
            positional, given = _split(args)
            if positional:
                raise InputError(f"{where}: the arguments of a backbone are a mapping, such as {{pretrained: True}}, got {positional}")
            self.backbones[number] = Backbone(name, **given)
            row[2:] = BACKBONE, [Built(name, self.backbones[number])]
        if repeats != 1 and (row[2] in NAMES and (name in GATES or row[2] != name) or name == FEATURE_MAP):
            raise InputError(f"{where}: there can be one of it, not {repeats}, since its output is not what it takes")

    @staticmethod
    def _check_known(number: int, name: str) -> bool:
        """Whether the parser knows the name itself. Raises InputError where nobody does."""
        if name.startswith(("nn.", "torchvision.ops.")) or name in vars(tasks):
            return True
        if not timm.is_model(name):
            modules = [key for key, value in vars(tasks).items() if isinstance(value, type) and issubclass(value, nn.Module)]
            raise InputError(f"row {number} of the model: there is no layer or model {name!r}"
                             f"{near_misses(name, {*LAYERS, FEATURE_MAP, *modules, *timm.list_models()})}")
        return False

    def _translate_layer(self, number: int, row: list[Any], args: dict[str, Any]) -> None:
        source, _, name, _ = row
        if name in GATES:
            if not isinstance(source, list) or len(source) != 2:
                raise InputError(f"row {number} of the model, {name}: it takes two maps, [the map, the gating signal], got from = {source}")
            self.sources[number] = source
            row[0], row[3] = source[0], ["ch", source, args]  # the parser has the width of its output from the one map
        elif isinstance(source, list):
            raise InputError(f"row {number} of the model, {name}: it takes one map, got from = {source}")
        elif (width := args.pop(OUT_WIDTH.get(name, ""), None)) is not None:
            row[2], row[3] = wide(name), [width, args]
        elif name == "DeformableTokenMerging":
            raise InputError(f"row {number} of the model, {name}: its first argument is missing, the width of its output, as Conv has it")
        else:
            row[3] = ["c2", args] if source == -1 else ["ch", [source], args]

    def _feature_map(self, where: str, number: int, source: int | list[int], args: list[Any]) -> list[int]:
        """The arguments of Ultralytics' Index: width and place."""
        backbone = None if isinstance(source, list) else self.backbones.get(source if source >= 0 else number + source)
        if backbone is None:
            raise InputError(f"{where}: it takes one of the maps of a backbone, and row {source} is none")
        count = len(backbone.channels)
        if len(args) != 1 or not isinstance(args[0], int) or not -count <= args[0] < count:
            raise InputError(f"{where}: its argument is the number of one of {count} maps, at strides "
                             f"{', '.join(map(str, backbone.strides))}, counted from 0 or from -1 backwards; got {args}")
        return [backbone.channels[args[0]], args[0]]

    def finish(self, model: Any, save: list[int], verbose: bool) -> tuple[nn.Sequential, list[int]]:
        for number, sources in self.sources.items():
            model[number].f = sources
            save = sorted([*save, *(source % number for source in sources if source != -1)])
        for number, (layer, args) in self.attached.items():
            module: Any = attach(model[number], partial(Layer, layer), **args)
            module.np = sum(parameter.numel() for parameter in module.parameters())
            if verbose:
                tasks.LOGGER.info(f"{layer} after the sums in row {number}, which has {module.np:,} parameters with it")
        return model, save


def _split(args: list[Any] | dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments as a list, as a mapping, or as a list whose last entry is a mapping."""
    if isinstance(args, dict):
        return [], dict(args)
    return (args[:-1], dict(args[-1])) if args and isinstance(args[-1], dict) else (args, {})


def _bound(where: str, name: str, positional: list[Any], given: dict[str, Any], also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments of a layer by their names, without its widths, which are found. Raises InputError for those that do not fit."""
    if name not in LAYERS:
        raise InputError(f"{where}: there is no layer {name!r}{near_misses(name, LAYERS)}")
    parameters = inspect.signature(getattr(zoo.layers, name)).parameters
    known = [key for key in parameters if key not in ("dim", "gate_dim", "device", "dtype")]
    if len(positional) > len(known):
        raise InputError(f"{where}: it takes at most {len(known)} arguments, {', '.join(known)}, without its width, which is found; "
                         f"got {positional}")
    bound = dict(zip(known, positional, strict=False))
    for key, value in given.items():
        if key not in (*known, *also):
            raise InputError(f"{where}: there is no argument {key!r}; {', '.join((*known, *also))} are known{near_misses(key, known)}")
        if key in bound:
            raise InputError(f"{where}: the argument {key} is given twice, {bound[key]} and {value}")
        bound[key] = value
    missing = [key for key in known if parameters[key].default is inspect.Parameter.empty and key not in bound]
    if missing:
        raise InputError(f"{where}: the argument {missing[0]} is missing")
    return bound
