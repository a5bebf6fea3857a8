"""Models and tools on OpenMMLab's engine: importing registers everything that configs name."""
from zoo.errors import require

require("zoo.mm, which trains and tests,", "train", "mmengine")

from zoo.mm import (  # noqa: E402
    backbone,  # noqa: F401  registered so, as are the next
    checkpoint,  # noqa: F401
    classifier,  # noqa: F401
    corruptions,  # noqa: F401
    datasets,  # noqa: F401
    downstream,  # noqa: F401
    fixations,  # noqa: F401
    hooks,  # noqa: F401
    mask_datasets,  # noqa: F401
    metrics,  # noqa: F401
    optim,  # noqa: F401
    segmentor,  # noqa: F401
)
from zoo.mm.backbone import TimmBackbone  # noqa: E402
from zoo.mm.training import evaluate, train  # noqa: E402

__all__ = ["TimmBackbone", "evaluate", "train"]
