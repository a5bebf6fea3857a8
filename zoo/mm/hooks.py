"""What happens around every step of training."""
import random
from collections.abc import Sized
from typing import Any, Literal, cast

import numpy as np
import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, ValLoop

from zoo.errors import InputError

Reported = Literal["average", "weights", "both"]


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
    """Keeps an exponential moving average of the weights.

    In checkpoints the one that is reported is the `state_dict`, and the other lies beside it in `ema_state_dict`, from where training
    goes on with both.

    Running statistics of batch norms are averaged over the ranks after every epoch, so that the ranks evaluate, and
    rank 0 saves, one and the same model.

    Args:
        decay: share of the average that a step keeps; the new weights enter with 1 - decay.
        report: "average" is evaluated in place of the weights; "weights": the average is kept, and not evaluated; "both" are
            evaluated, the average's metrics with `_ema` at the end of their names, and the weights are reported.
    """

    def __init__(self, decay: float, report: Reported = "average"):
        if report not in Reported.__args__:
            raise InputError(f"report={report!r}: it is one of {', '.join(Reported.__args__)}")
        super().__init__(momentum=1 - decay)
        self.report = report

    def before_val_epoch(self, runner: Runner) -> None:
        if self.report == "average":
            self._swap_ema_parameters()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self.report == "average":
            self._swap_ema_parameters()
        elif self.report == "both":
            self._swap_ema_parameters()
            averaged = self._evaluate(runner)
            self._swap_ema_parameters()
            for name, value in averaged.items():
                cast(dict[str, float], metrics)[f"{name}_ema"] = value
                runner.message_hub.update_scalar(f"val/{name}_ema", value)  # from where it is logged

    def before_test_epoch(self, runner: Runner) -> None:
        self.before_val_epoch(runner)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self.report == "average":
            self._swap_ema_parameters()

    @torch.no_grad()
    def _evaluate(self, runner: Runner) -> dict[str, float]:
        loop = cast(ValLoop, runner.val_loop)
        loader, evaluator = loop.dataloader, loop.evaluator
        for batch in loader:
            evaluator.process(data_samples=cast(Any, runner.model).val_step(batch), data_batch=batch)
        return evaluator.evaluate(len(cast(Sized, loader.dataset)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["ema_state_dict"] = self.ema_model.state_dict()
        checkpoint["meta"]["averaged"] = self.report == "average"
        if self.report == "average":
            self._swap_ema_state_dict(checkpoint)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and not checkpoint.get("meta", {}).get("averaged", True):
            self.ema_model.load_state_dict(checkpoint["ema_state_dict"])
        else:
            super().after_load_checkpoint(runner, checkpoint)

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
        held_out = cast(Any, runner.val_loop or runner.train_loop).dataloader.dataset
        checkpoint["zoo"] = {"task": model.task, "model": model.name, "model_args": model.args,
                             "classes": list(held_out.metainfo["classes"]), **held_out.data_config}


class LastMetricsHook(Hook):
    """Remembers the metrics of the last evaluation in `metrics`."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] | None = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metrics = metrics
