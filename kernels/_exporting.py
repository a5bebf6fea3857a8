from collections.abc import Iterable
from typing import cast

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether what runs is recorded, by `torch.export` or `torch.jit.trace`, into a graph that other batches and sizes may be given to.

    Where it is, ask nothing of sizes: what was found of the recorded ones is in the graph for all. Not `torch.compile`, which asks again
    where sizes change.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def known(facts: Iterable[bool]) -> bool:
    """Whether these hold, of sizes; of free ones in a graph only if they always do, as asking would make a graph of every answer."""
    return not is_exporting() and all(map(statically_known_true, facts))


def at_least(n: int, least: int) -> int:
    """max(n, least), of sizes: also of those in graphs, whose larger one is found when the graph runs."""
    return cast(int, n.clamp(min=least) if isinstance(n, torch.Tensor) else torch.sym_max(n, least))
