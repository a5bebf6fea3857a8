"""Pictures in the toolboxes' pipelines, read as everywhere else in the zoo. Imported where a config is of a toolbox."""
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from zoo.reading.pictures import open_picture


@TRANSFORMS.register_module()
class LoadPicture(BaseTransform):
    """Reads a picture by `zoo.reading.pictures.open_picture`, as predicting does: turned upright, in 8 bits, blue, green and red.

    Args:
        to_float32: as of mmcv's `LoadImageFromFile`, whose place it takes.

    Raises InputError for a file that cannot be read.
    """

    def __init__(self, to_float32: bool = False):
        self.dtype = np.float32 if to_float32 else np.uint8

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        pixels = np.asarray(open_picture(results["img_path"]))[..., ::-1]
        results["img"] = np.ascontiguousarray(pixels, self.dtype)
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results
