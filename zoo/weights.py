"""Which weights of a file are a model's, under which names, and whether they fit.

One rule, whatever route a file is loaded by: the weights that its authors evaluated (`zoo.models.released` says of each), which are
those under `state_dict` or `model`; their exponential moving average, under `state_dict_ema` or `model_ema`, only where it is asked
for with `ema=True`. Which ones were taken is said in one line of the log `zoo` (level INFO).
"""
import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from zoo.errors import InputError, near_misses
from zoo.unpickling import forced_strict, read_inert

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")
RAW_KEYS = ("state_dict", "model", "model_state_dict", "net")
EMA_KEYS = ("state_dict_ema", "model_ema")
# The engine's checkpoints hold what is averaged in `state_dict`, and in `ema_state_dict` what it was averaged from.
SWAPPED_KEY = "ema_state_dict"
# What stands before names: of torch's wrappers, before all of them; of what holds the network beside other things, before its own.
WRAPPERS = ("module.", "_orig_mod.")
HOLDERS = ("model.", "backbone.", "network.", "timm_model.")
ALMOST = 0.9  # of a model's names, from which on a file that does not fit is taken for a version of the model
FILLED_IN = ".num_batches_tracked"  # files of before PyTorch 0.4.1 lack it, and torch does not miss it

LOG = logging.getLogger("zoo")
Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def read(path: str | Path, map_location: str | torch.device = "cpu", allow: Iterable[Callable | tuple[Callable, str]] = ()) -> object:
    """What the file at `path` holds: tensors, containers, numbers and text. Nothing that it names is run.

    `.safetensors` files give a dict of tensors. Others, written by torch.save, give all that is plain, and in the place of what is
    not, such as arguments, configs, log histories and NumPy's numbers, stand-ins (`zoo.unpickling.Ignored`) that hold and do nothing.
    With `allow`, classes or pairs (class, the name that it stands for in the file) as torch.serialization.safe_globals takes them,
    those are read as themselves, and a file that needs anything else is refused.

    Raises InputError for a missing, unreadable, empty or damaged file, and for one that was made to run code or to fill the memory.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a checkpoint file{_checkpoints_in(path)}")
    if not path.exists():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"there is no checkpoint {path}{near_misses(path.name, others)}")
    if path.suffix.lower() == ".onnx":
        raise InputError(f"{path} is an ONNX file, which `zoo predict` takes; here a checkpoint is needed, such as `zoo train` writes")
    allow = list(allow)
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty, not a checkpoint")
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(map_location))
        if not allow and not forced_strict():
            return read_inert(path, map_location)
        with torch.serialization.safe_globals(allow):
            return torch.load(path, map_location=map_location, weights_only=True)
    except InputError:
        raise
    except PermissionError:
        raise InputError(f"{path} cannot be read: permission denied") from None
    except Exception as error:  # damaged bytes surface as almost any exception of the unpickler and the zip reader
        raise InputError(_why_unreadable(path, error, allow)) from error


def weights_in(file: str | Path | Mapping, ema: bool = False, *, own: Iterable[str] = (), licence: str | None = None) -> dict[str, Tensor]:
    """The weights in a checkpoint by the names of the network that they are of.

    Those under `state_dict`, `model`, `model_state_dict` or `net`, whichever comes first in this order, or the whole file where it
    has none of them; with `ema` their average, under `state_dict_ema` or `model_ema`. What DataParallel, DistributedDataParallel
    and torch.compile put before names (`module.`, `_orig_mod.`) is taken off, and so is what holds the network in Lightning's
    modules (`model.`), mmengine's (`backbone.`), transformers' (`timm_model.`) and the zoo's (`model.`, `backbone.network.`), in any
    order; tensors beside it are left. Writes one line to the log: the file, the key, the number of tensors, and the licence if one is
    given.

    Args:
        file: a path, or what was read from one.
        own: names of the model that the weights are for; what stands before one of these is never taken off.

    Raises InputError for what `read` refuses, for a file without weights, and for `ema` where there is no average.
    """
    content, called = (file, "a dict of weights") if isinstance(file, Mapping) else (read(file), str(file))
    if not isinstance(content, Mapping):
        raise InputError(f"{called} holds a {type(content).__name__}, not weights by name")
    key, tensors = _picked(content, ema, called)
    kept = _unwrapped(tensors, tuple(own))
    notes = [f"{len(kept)} tensors under {key!r}" if key else f"{len(kept)} tensors"]
    if len(kept) < len(tensors):
        notes.append(f"{len(tensors) - len(kept)} beside the network left")
    if not ema and (average := next((name for name in EMA_KEYS if _tensors(content.get(name))), None)) and average != key:
        notes.append(f"{average!r} left: ema=True takes it")
    LOG.info("weights from %s: %s; licence %s", called, ", ".join(notes), licence or "unknown")
    return kept


def load_weights(model: nn.Module, file: str | Path | Mapping, ema: bool = False, filter_fn: Filter | None = None,
                 new_head: bool = False) -> None:
    """Loads the weights that `weights_in` finds in `file` into `model`, all of them and no others.

    The names may be the model's, or, for models of the zoo, those of its authors' code.

    Args:
        filter_fn: turns names and shapes into the model's; by default what the model's family offers.
        new_head: the model keeps its own head, and the file may have another, or none.

    Raises InputError, and leaves the model as it was, for what `weights_in` refuses and for weights that do not fit.
    """
    if filter_fn is None:
        filter_fn = getattr(_family(model), "checkpoint_filter_fn", None)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    given = weights_in(file, ema, own=own_names(model), licence=cfg.get("license"))
    weights = converted(given, model, filter_fn)
    heads = cfg.get("classifier") if new_head else ()
    free = [name for head in ([heads] if isinstance(heads, str) else heads or ()) for name in (f"{head}.weight", f"{head}.bias")]
    check_fit(weights, given, model, filter_fn, "the state dict" if isinstance(file, Mapping) else str(file), free=free)
    own = {name: value for name, value in model.state_dict().items() if name in free}
    model.load_state_dict({name: value for name, value in weights.items() if name not in free} | own)


def converted(given: dict[str, Tensor], model: nn.Module, filter_fn: Filter | None) -> dict[str, Tensor]:
    """`filter_fn(given, model)`, or `given` where that does not understand its names and shapes, which are then another network's."""
    try:
        return filter_fn(given, model) if filter_fn else given
    except (KeyError, IndexError, RuntimeError):
        return given


def check_fit(weights: Mapping[str, Tensor], given: Mapping[str, Tensor], model: nn.Module, filter_fn: Filter | None, called: str,
              free: Iterable[str] = (), resized: Iterable[str] = ()) -> None:
    """Raises InputError unless `weights` are the model's, name by name and shape by shape; `given` they were before `filter_fn`.

    Those named in `free` may be missing, of another shape, or there in vain; those in `resized` may have another shape.
    """
    free, resized = set(free), set(resized)
    needed, found = _shapes(model.state_dict()), _shapes(weights)
    shaped = {name for name in needed.keys() & found.keys() - free - resized if needed[name] != found[name]}
    wrong = [f"{name} {found[name]} where {needed[name]} is needed" for name in needed if name in shaped]
    wrong += [f"{name} (missing)" for name in needed if name not in found and name not in free and not name.endswith(FILLED_IN)]
    wrong += [f"{name} (of no use)" for name in found if name not in needed and name not in free]
    if wrong:
        fit = len(needed.keys() & found.keys() - shaped)
        raise InputError(f"{called} does not hold the weights of {_architecture(model) or type(model).__name__}: {fit} of its "
                         f"{len(needed)} names fit; {len(wrong)} do not, such as {', '.join(wrong[:3])}; "
                         f"{_seems(given, model, filter_fn) if fit < ALMOST * len(needed) else 'it seems to be a changed version of it'}")


def _picked(content: Mapping, ema: bool, called: str) -> tuple[str, dict[str, Tensor]]:
    found = {key: tensors for key in (*RAW_KEYS, *EMA_KEYS) if (tensors := _tensors(content.get(key)))}
    raw, averaged = [key for key in RAW_KEYS if key in found], [key for key in EMA_KEYS if key in found]
    if ema and not averaged and not (raw and _tensors(content.get(SWAPPED_KEY))):
        raise InputError(f"{called} holds no average of the weights ({' or '.join(EMA_KEYS)}), only {', '.join(raw) or 'weights'}")
    if ema and averaged:
        return averaged[0], found[averaged[0]]
    if key := next(iter(raw or averaged), None):
        return key, found[key]
    if tensors := _tensors(content):
        return "", tensors
    raise InputError(f"{called} holds no weights by name, but {', '.join(map(str, list(content)[:4])) or 'nothing'}; "
                     "a model saved whole has to be saved again, as its state_dict()")


def _tensors(value: object) -> dict[str, Tensor]:
    """The tensors by name in a dict, also where the dict is held under one more of the keys."""
    if not isinstance(value, Mapping):
        return {}
    tensors = {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}
    return tensors or next((inner for key in RAW_KEYS if (inner := _tensors(value.get(key)))), {})


def _unwrapped(tensors: dict[str, Tensor], own: tuple[str, ...]) -> dict[str, Tensor]:
    while True:
        before = tensors
        for prefix in WRAPPERS:
            if not any(name.startswith(prefix) for name in own):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        for prefix in HOLDERS:
            if any(name.startswith(prefix) for name in tensors) and not any(name.startswith(prefix) for name in own):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if tensors.keys() == before.keys():
            return tensors


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def own_names(model: nn.Module) -> list[str]:
    """Names before which nothing is taken off: the model's, and beginnings of its authors' that its family says by `AUTHORS_NAMES`."""
    return [*model.state_dict(), *getattr(_family(model), "AUTHORS_NAMES", ())]


def _family(model: nn.Module) -> object:
    """The module that registers the model; None of a model that is not registered."""
    name = _architecture(model)
    return sys.modules[timm.model_entrypoint(name).__module__] if timm.is_model(name) else None


def _architecture(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or ""


def _seems(weights: Mapping[str, Tensor], model: nn.Module, filter_fn: Filter | None) -> str:
    """What the weights seem to be of: a sibling of the model, or what their number and first names say."""
    for sibling in _siblings(_architecture(model)):
        with contextlib.suppress(Exception), torch.device("meta"):  # models and filters stumble over what is another's in many ways
            other = timm.create_model(sibling)
            found = converted(dict(weights), other, filter_fn)
            if _shapes(found) == _shapes(other.state_dict()):
                return f"they are those of {sibling}"
    count = sum(value.numel() for value in weights.values())
    names = ", ".join(list(weights)[:2])
    return f"it seems to be another network, of {count / 1e6:.2f} M numbers, whose names begin with {names}"


def _siblings(name: str) -> Iterator[str]:
    if timm.is_model(name):
        module = timm.model_entrypoint(name).__module__
        yield from (other for other in timm.list_models() if other != name and timm.model_entrypoint(other).__module__ == module)


def _checkpoints_in(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir() if path.suffix in CHECKPOINT_SUFFIXES)
    return f", for example {found[-1]}" if found else "; there is none in it"


def _why_unreadable(path: Path, error: Exception, allow: list) -> str:
    # Files in the format before zip archives cannot be listed; of those, the unpickler's message names the first global.
    text = str(error) if isinstance(error, UnpicklingError) else ""
    _, _, after = text.partition("GLOBAL ")
    needed = after.split()[:1]
    if needed and allow:
        with contextlib.suppress(Exception), torch.serialization.safe_globals(allow):
            needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if needed:
        return f"{path} would run code on loading and is refused: it names {', '.join(sorted(needed))}"
    if "larger than the file" in text:
        return f"{path} is refused: {text}"
    return (f"{path} is damaged or no checkpoint at all ({type(error).__name__} while reading it); give a file that `zoo train` wrote, "
            "or one with the authors' weights")
