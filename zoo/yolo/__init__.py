"""zoo's layers and backbones in the model files of Ultralytics YOLO: `import zoo.yolo`, then `YOLO("yolo11n-das.yaml")`.

Ultralytics is a package under the AGPL that nothing else of zoo imports. Importing this module tells its parser of model files of the
names that docs/guides/yolo.md lists; checkpoints import it by themselves, and so do the processes that a training on several GPUs starts.
"""
from zoo.errors import require

require("zoo.yolo", "yolo", "ultralytics")

from .modules import Backbone, Layer  # noqa: E402
from .ready import model_file, names  # noqa: E402
from .registration import register  # noqa: E402

__all__ = ["Backbone", "Layer", "model_file", "names", "register"]

register()
