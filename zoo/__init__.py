"""Attention mechanisms as timm models: `import zoo`, then `timm.create_model(...)`."""
import timm

from . import attnet, biformer, das, polarized, sknet
from .attach import attach

__all__ = ["attach", "attnet", "biformer", "das", "list_models", "polarized", "sknet"]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo's registered models that match a shell-style pattern."""
    return [name for name in timm.list_models(pattern) if timm.model_entrypoint(name).__module__.split(".")[0] == __name__]
