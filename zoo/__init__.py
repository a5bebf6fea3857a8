"""Attention mechanisms as timm models: `import zoo`, then `timm.create_model(...)`."""
from . import biformer

__all__ = ["biformer"]
