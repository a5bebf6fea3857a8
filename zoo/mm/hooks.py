"""What happens around every step of training."""
import math
import random
import time
from collections.abc import Iterator, Mapping, Sized
from datetime import timedelta
from typing import Any, Literal, cast

import numpy as np
import torch
from mmengine.dist import all_reduce, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner, ValLoop
from mmengine.structures import BaseDataElement
from torch import Tensor
from tqdm import tqdm

from zoo.attention_removal import attention_share, diluted_blocks, remove_attention
from zoo.errors import InputError

Reported = Literal["average", "weights", "both"]
NAMED = 5  # classes that are said to be learned
UNSEEN = 5e-5  # what the log shows as 0.0000


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
class AttentionDilutionHook(Hook):
    """Lets attention fade out of the blocks that have a share of it: λ = max(0, 1 − epoch / (epochs − 1)) (arXiv 2404.05657).

    The blocks are those of the change `remove_attention` with `share=1.0` in the model's `changes`. λ follows from the epoch, so that a
    run that was resumed is an unbroken one. Checkpoints of after that, among which the best is looked for, are loaded without attention
    in these blocks.

    Args:
        part: of the run in which attention fades out, above 0; the authors' are 300 of 400 epochs
            (https://github.com/sihaoevery/lambda_vit).

    Raises InputError where training begins: no such blocks, fewer than 2 epochs for it, or a run that counts steps.
    """

    def __init__(self, part: float = 0.75):
        if not 0 < part <= 1:
            raise InputError(f"part must be above 0 and at most 1, got {part!r}")
        self.part = part

    def before_train(self, runner: Runner) -> None:
        if not diluted_blocks(_network(runner)):
            raise InputError("AttentionDilutionHook finds no block with a share of attention; the model's changes say which have one: "
                             "model.changes=[{'type':'remove_attention','blocks':[0,2],'share':1.0}]")
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise InputError("AttentionDilutionHook counts epochs, and this run counts steps")
        self.epochs = math.ceil(self.part * runner.max_epochs)
        attention_share(0, self.epochs)  # refuses runs that are too short

    def before_train_epoch(self, runner: Runner) -> None:
        share = attention_share(runner.epoch, self.epochs)
        remove_attention(_network(runner), diluted_blocks(_network(runner)), share)
        runner.message_hub.update_scalar("train/attention_share", share)


def _network(runner: Runner) -> Any:
    return getattr(runner.model, "module", runner.model)


@HOOKS.register_module()
class RecordHook(Hook):
    """Adds to every checkpoint, as `zoo`, what it takes to use the model without its config: plain values only."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = _network(runner)
        if not hasattr(model, "task"):  # of somebody else's, who has to know its config
            return
        held_out = cast(Any, runner.val_loop or runner.train_loop).dataloader.dataset
        checkpoint["zoo"] = {"task": model.task, "model": model.name, "model_args": model.args,
                             "classes": list(held_out.metainfo["classes"]), **held_out.data_config}
        if changes := getattr(model, "changes", None):
            checkpoint["zoo"]["changes"] = changes


@HOOKS.register_module()
class FiniteHook(Hook):
    """Stops a run whose losses, outputs or weights are not finite, before there is a checkpoint of it. Raises InputError."""

    priority = "VERY_HIGH"

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        losses = {name: torch.as_tensor(value).item() for name, value in (outputs or {}).items()}
        found = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not found:
            return
        inputs = data_batch.get("inputs") if isinstance(data_batch, Mapping) else None
        why = ("its inputs are not finite: mend the data" if not _finite(inputs) else
               "lower the rate, optim_wrapper.optimizer.lr, clip gradients, optim_wrapper.clip_grad, or train without mixed precision")
        raise InputError(f"training stopped at step {runner.iter + 1}, in epoch {runner.epoch + 1}: {', '.join(found)}; {why}")

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not _finite(outputs):
            raise InputError(f"the outputs for batch {batch_idx + 1} of the evaluated data are not finite; the weights have diverged, or "
                             "the data are not finite")

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.after_val_iter(runner, batch_idx, data_batch, outputs)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if bad := [name for name, value in checkpoint["state_dict"].items() if not _finite(value)]:
            raise InputError(f"training stopped after step {runner.iter}: {len(bad)} of {len(checkpoint['state_dict'])} weights are not "
                             f"finite, such as {bad[0]}; lower the rate, optim_wrapper.optimizer.lr, or clip gradients, "
                             "optim_wrapper.clip_grad")


def _finite(value: object) -> bool:
    """Whether all tensors of floating point in nested containers are."""
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value) if tensor.is_floating_point())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | BaseDataElement | list | tuple):
        for item in value if isinstance(value, list | tuple) else value.values():
            yield from _tensors(item)


@HOOKS.register_module()
class ScreenHook(Hook):
    """Says what is trained, on what and how long; then a line for every epoch, or every interval of validation where steps are counted.

    The line has the mean of the loss, the metric that says which checkpoint is the best, the rate, and the time gone and left. On a
    terminal there is a progress bar, too. Only the process of rank 0 says anything.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.line: list[str] = []
        self.losses: list[float] = []
        self.silent: set[str] | None = None
        self.steps = 0

    def before_train(self, runner: Runner) -> None:
        loop, model = runner.train_loop, _network(runner)
        self.start, self.first = time.monotonic(), runner.iter
        self.by_epoch = isinstance(loop, EpochBasedTrainLoop)
        self.length = len(runner.train_dataloader) if self.by_epoch else cast(Any, loop).val_interval
        name = getattr(model, "name", None) or type(model).__name__
        if backbone := getattr(getattr(model, "backbone", None), "name", None):
            name += f" with {backbone}"
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        classes = list((getattr(runner.train_dataloader.dataset, "metainfo", None) or {}).get("classes") or ())
        named = ", ".join(map(str, classes[:NAMED])) + (", …" if len(classes) > NAMED else "")
        held_out = f"; evaluated on {len(cast(Any, runner.val_loop).dataloader.dataset)}" if runner.val_loop is not None else ""
        of_classes = f" of {len(classes)} classes ({named})" if classes else ""
        self._say(f"{name}, {millions:.2f} million parameters, is trained on {len(cast(Any, runner.train_dataloader.dataset))} samples"
                  f"{of_classes}{held_out}")
        count = f"{runner.max_epochs} epochs of {self.length} steps" if self.by_epoch else f"{runner.max_iters} steps"
        batch = f" of {runner.train_dataloader.batch_size} samples" if runner.train_dataloader.batch_size else ""
        device = next(model.parameters()).device
        where = f"{device}" + (f", in {get_world_size()} processes" if get_world_size() > 1 else "")
        after = f", going on after {self._place(runner)}" if runner.iter else ""
        self._say(f"{count}{batch} on {where}{after}; the whole log: {cast(MMLogger, runner.logger).log_file}")

    def before_train_epoch(self, runner: Runner) -> None:
        self._say_line(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._say_line(runner)
        self.rate = next(iter(cast(OptimWrapper, runner.optim_wrapper).get_lr().values()))[0]
        if self.bar is None:
            here = f"epoch {runner.epoch + 1}/{runner.max_epochs}" if self.by_epoch else f"to step {runner.max_iters}"
            self._begin(here, self.length)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        self.steps += 1
        values = {name: torch.as_tensor(value).item() for name, value in (outputs or {}).items()}
        self.losses.append(values.get("loss", math.nan))
        self.silent = {name for name, value in values.items() if abs(value) < UNSEEN and (self.silent is None or name in self.silent)}
        self._step(f"loss {self.losses[-1]:.4f}")
        if not self.by_epoch and (self.every_n_train_iters(runner, self.length) or self.is_last_train_iter(runner)):
            self._finish(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch:
            self._finish(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        self._begin("evaluating", len(cast(Any, runner.val_loop).dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._step()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._end()
        if self.line and metrics:
            key = self._best(runner)[0] or next(iter(metrics))
            self.line.insert(2, f"{key} {metrics.get(key, math.nan):.4g}")

    def before_test_epoch(self, runner: Runner) -> None:
        self._begin("testing", len(cast(Any, runner.test_loop).dataloader))

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._step()

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._end()

    def after_train(self, runner: Runner) -> None:
        self._say_line(runner)
        key, path = self._best(runner)
        if path is not None:
            info = runner.message_hub.runtime_info
            self._say(f"best {key}: {info.get('best_score', info.get(f'best_score_{key}')):.4g}, {path}")

    def _finish(self, runner: Runner) -> None:
        self._end()
        if self.steps == len(self.losses):  # the first that is finished
            for name in sorted(name for name in self.silent or () if "loss" in name or "similarity" in name):
                why = ": no weight of attention is above attention_threshold / tokens; lower it" if "attention" in name else ""
                runner.logger.warning(f"{name} has been 0 at every step, and nothing is learned from it{why}")
        here = self._place(runner, 1)
        self.line = [here, f"loss {sum(self.losses) / max(1, len(self.losses)):.4f}", f"rate {self.rate:.3g}"]
        self.losses = []

    def _place(self, runner: Runner, more: int = 0) -> str:
        """Where training is; hooks are called before the engine counts one `more`."""
        what, at, end = (("epoch", runner.epoch, runner.max_epochs) if self.by_epoch else ("step", runner.iter, runner.max_iters))
        return f"{what} {at + more:>{len(str(end))}}/{end}"

    def _best(self, runner: Runner) -> tuple[str | None, str | None]:
        """The name of the metric by which the best checkpoint is chosen, and that checkpoint, as far as there are any."""
        hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best), None)
        if hook is None or hook.key_indicators[0] == "auto":
            return None, None
        key = hook.key_indicators[0]
        return key, hook.best_ckpt_path if len(hook.key_indicators) == 1 else hook.best_ckpt_path_dict.get(key)

    def _say_line(self, runner: Runner) -> None:
        if self.line:
            gone = time.monotonic() - self.start
            left = gone / self.steps * (runner.max_iters - self.first - self.steps)
            self._say("  ".join([*self.line, f"{timedelta(seconds=round(gone))}, {timedelta(seconds=round(left))} left"]))
            self.line = []

    def _say(self, text: str) -> None:
        if is_main_process():
            print(text, flush=True)

    def _begin(self, what: str, length: int) -> None:
        self.bar = tqdm(total=length, desc=what, leave=False, disable=None if is_main_process() else True)  # None: off a terminal

    def _step(self, text: str = "") -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class LastMetricsHook(Hook):
    """Remembers the metrics of the last evaluation in `metrics`."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] | None = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metrics = metrics
