"""Models and tools on OpenMMLab's engine: importing registers everything that configs name."""
from zoo.errors import require

require("zoo.mm, which trains and tests,", "train", "mmengine")

from zoo.mm import (  # noqa: F401, E402  registered so
    backbone,
    checkpoint,
    classifier,
    corruptions,
    datasets,
    downstream,
    fixations,
    hooks,
    mask_datasets,
    metrics,
    optim,
    restorer,
    saliency,
    segmentor,
    shrunk_datasets,
)
from zoo.mm.backbone import TimmBackbone  # noqa: E402
from zoo.mm.training import evaluate, train  # noqa: E402

__all__ = ["TimmBackbone", "evaluate", "train"]
