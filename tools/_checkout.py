"""Imported first by every program that is run as a script, by its path.

The programs then use the `zoo` that they lie in, wherever that of the environment is, and none of them, such as test.py, can be
imported in the place of a module of the same name.
"""
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = next(folder for folder in _HERE.parents if (folder / "zoo" / "__init__.py").is_file())
sys.path[:] = [str(_ROOT), *(entry for entry in sys.path if Path(entry).resolve() != _HERE)]
