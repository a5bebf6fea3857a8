"""mmengine's Runner as it is used here: schedules are the config's whatever was resumed, and its log is kept off the screen."""
import contextlib
import functools
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger, print_log
from mmengine.optim import OptimWrapper, _ParamScheduler
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner import Runner as EngineRunner
from torch.utils.data import DataLoader

# What a group of parameters has of the config. The rest is the state of the optimizer, which resuming takes from the checkpoint.
OF_THE_CONFIG = ("lr", "weight_decay", "momentum", "betas")
OF_SCHEDULES = ("initial_", "max_", "min_")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Runner(EngineRunner):
    """As the engine's, but for resuming, and for what appears on the screen: warnings, and what `ScreenHook` prints.

    The rest of the log, and what the toolboxes print while they read data and evaluate, goes to the file.
    """

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        screen = logger.handlers[0]
        screen.setLevel(max(screen.level, logging.WARNING))
        screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        screen.addFilter(lambda record: "will be deprecated" not in record.getMessage())  # what the engine tells itself
        return logger

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> DataLoader:
        return _printing_to_the_log(EngineRunner.build_dataloader)(*args, **kwargs)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        built = _printing_to_the_log(super().build_evaluator)(evaluator)
        vars(built)["evaluate"] = _printing_to_the_log(built.evaluate)
        return built

    def resume(self, filename: str, resume_optimizer: bool = True, resume_param_scheduler: bool = True, map_location: Any = "default",
               ) -> None:
        """Goes on from a checkpoint with rates, momentum and weight decay that are the config's, as if it had been trained by it until now.

        So more epochs, another batch size or another rate count.
        """
        schedulers, wrapper = cast(list[_ParamScheduler], self.param_schedulers or []), cast(OptimWrapper, self.optim_wrapper)
        begun = [{key: value for key, value in group.items() if key in OF_THE_CONFIG or key.startswith(OF_SCHEDULES)}
                 for group in wrapper.param_groups]
        super().resume(filename, resume_optimizer, False, map_location)
        for group, values in zip(wrapper.param_groups, begun, strict=True):
            group.update(values)
        loop = cast(Any, self.train_loop)
        by_epoch, steps = isinstance(loop, EpochBasedTrainLoop), len(self.train_dataloader)
        if by_epoch:
            loop._iter = loop._epoch * steps  # of this config, whose batches may have another size
        vars(wrapper)["_global_step"] = loop._iter  # which schedulers compare with their own
        measured = [iter(self._measured(scheduler)) for scheduler in schedulers]
        for step in range(1, loop._iter + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
            if not by_epoch or step % steps:
                continue
            for scheduler in schedulers:
                if scheduler.by_epoch:
                    scheduler.step()
            if (epoch := step // steps) >= self.val_begin and epoch % self.val_interval == 0:
                for scheduler, values in zip(schedulers, measured, strict=True):
                    for metrics in itertools.islice(values, 1):
                        cast(Any, scheduler).step(metrics)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return _printing_to_the_log(super().load_checkpoint)(*args, **kwargs)

    def _measured(self, scheduler: _ParamScheduler) -> list[dict[str, float]]:
        """What a scheduler that looks at a metric has seen."""
        monitor = getattr(scheduler, "monitor", "")
        history = self.message_hub.log_scalars.get(f"val/{monitor}")
        return [{monitor: value} for value in history.data[0].tolist()] if history else []


class _Log(io.TextIOBase):
    """A file that takes what is printed into the log."""

    def write(self, text: str) -> int:
        if text.strip():
            print_log(text.strip(), "current")
        return len(text)


def _printing_to_the_log(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    @functools.wraps(function)
    def logged(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with contextlib.redirect_stdout(_Log()):
            return function(*args, **kwargs)

    return logged


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Inside, what is printed, logged and warned of is lost: for what a run does, and says, once more."""
    if not MMLogger.check_instance_created("zoo"):
        MMLogger.get_instance("zoo", log_level="ERROR")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def warnings_in_the_log() -> Iterator[None]:
    """Inside, Python's warnings are lines of the log of the run, each of them once."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **more: print_log(" ".join(str(message).split()), "current", logging.WARNING)
        yield
