"""What happens around every step of training."""
import random

import numpy as np
import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds all generators from (seed, iteration, rank) before every iteration.

    Mixup, dropout and drop path then draw the same whether or not training was interrupted before.
    """

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        seed = int(np.random.SeedSequence((runner.seed, runner.iter, get_rank())).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@HOOKS.register_module()
class ModelEMAHook(EMAHook):
    """Keeps an exponential moving average of the weights: evaluated, and saved as `state_dict`, in place of the weights.

    Running statistics of batch norms are averaged over the ranks after every epoch, so that the ranks evaluate, and
    rank 0 saves, one and the same model.

    Args:
        decay: share of the average that a step keeps; the new weights enter with 1 - decay.
    """

    def __init__(self, decay: float):
        super().__init__(momentum=1 - decay)

    def after_train_epoch(self, runner: Runner) -> None:
        buffers = zip(self.src_model.buffers(), self.ema_model.module.buffers(), strict=True)
        for buffer, averaged in buffers:
            if buffer.is_floating_point() and get_world_size() > 1:
                all_reduce(buffer, op="mean")
                averaged.copy_(buffer)


@HOOKS.register_module()
class RecordHook(Hook):
    """Adds to every checkpoint, as `zoo`, what it takes to use the model without its config: plain values only."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = getattr(runner.model, "module", runner.model)
        held_out = (runner.val_loop or runner.train_loop).dataloader.dataset
        checkpoint["zoo"] = {"task": model.task, "model": model.name, "model_args": model.args,
                             "classes": list(held_out.metainfo["classes"]), **held_out.data_config}


class LastMetricsHook(Hook):
    """Remembers the metrics of the last evaluation in `metrics`."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] | None = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metrics = metrics
