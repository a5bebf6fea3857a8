"""Registered models: a file for each family, what families share, and U-Nets around them."""
import importlib
import pkgutil

import timm

from zoo.errors import InputError, near_misses
from zoo.models.building import is_dense

__all__ = ["MECHANISMS", "REPORTED_TOP1", "is_dense", "list_models", "mechanism_of"]

__all__ = ["MECHANISMS", "REPORTED_TOP1", "is_dense", "list_models", "mechanism_of"]

_AROUND = ("dconnnet", "unet")  # others, which are there before them
_NAMES = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: name in _AROUND)
_MODULES = [importlib.import_module(f"{__name__}.{name}") for name in _NAMES]
MECHANISMS = {  # by the names of `attach`, and the pages of docs/: the family of models built on each
    family.MECHANISM: family for family in sorted((m for m in _MODULES if hasattr(m, "MECHANISM")), key=lambda m: m.MECHANISM)
}
REPORTED_TOP1 = {  # per cent on ImageNet-1k, by the authors: REPORTED_IN of each says where, docs/models.md with it
    name: top1 for family in MECHANISMS.values() for name, top1 in getattr(family, "REPORTED_TOP1", {}).items()
}


def list_models(pattern: str = "*", mechanism: str | None = None) -> list[str]:
    """Names of the zoo's registered models that match a shell-style pattern, of one mechanism or all.

    Raises InputError for a mechanism that is none of `MECHANISMS`.
    """
    if mechanism is not None and mechanism not in MECHANISMS:
        raise InputError(f"there is no mechanism {mechanism!r}; {', '.join(MECHANISMS)} are known{near_misses(mechanism, MECHANISMS)}")
    families = {family.__name__ for family in MECHANISMS.values()}
    names = [name for name in timm.list_models(pattern) if timm.model_entrypoint(name).__module__ in families]
    return [name for name in names if mechanism is None or mechanism_of(name) == mechanism]


def mechanism_of(name: str) -> str | None:
    """The mechanism of a model of the zoo; None where its family is compared with one without, such as a U-Net without gates."""
    module = timm.model_entrypoint(name).__module__
    mechanism = next(mechanism for mechanism, family in MECHANISMS.items() if family.__name__ == module)
    return None if name in getattr(MECHANISMS[mechanism], "PLAIN", ()) else mechanism
