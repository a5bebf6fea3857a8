"""Parts of MONAI, by name. Importing MONAI takes seconds, which only the tasks that use it wait for."""
import importlib
from collections.abc import Mapping
from typing import Any

from zoo.errors import InputError, near_misses, require


def monai_part(module: str, config: Mapping) -> Any:
    """The object that `config` describes: `type`, a name in `monai.<module>`, and arguments. Raises InputError."""
    require("segmentation", "volumes", "monai")
    found = importlib.import_module(f"monai.{module}")
    arguments = dict(config)
    name = arguments.pop("type", None)
    if not isinstance(name, str) or not hasattr(found, name):
        raise InputError(f"monai.{module} has no {name!r}{near_misses(str(name), dir(found))}")
    try:
        return getattr(found, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"monai.{module}.{name} cannot be set up: {error}") from error
