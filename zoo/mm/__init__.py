"""Models and tools on OpenMMLab's engine: importing registers everything that configs name."""
from zoo.mm import checkpoint, classifier, corruptions, datasets, hooks, masks, metrics, optim, segmentor  # noqa: F401
from zoo.mm.training import evaluate, train

__all__ = ["evaluate", "train"]
