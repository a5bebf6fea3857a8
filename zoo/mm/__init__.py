"""Models and tools on OpenMMLab's engine: importing registers everything that configs name."""
from zoo.mm import backbone, checkpoint, classifier, corruptions, datasets, downstream, hooks, mask_datasets, metrics, optim, segmentor  # noqa: F401  registered so
from zoo.mm.backbone import TimmBackbone
from zoo.mm.training import evaluate, train

__all__ = ["TimmBackbone", "evaluate", "train"]
