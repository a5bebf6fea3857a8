"""The selective scan position by position, as one node of an exported graph, which then holds for every length: ONNX's Scan.

In chunks it would be a graph of one length. ONNX Runtime takes a position in less time than a chunk's share of it.
"""
import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan, scan_op

from .reference import step_sizes


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """See `zoo.kernels.selective_scan`."""
    inner, groups = torch.promote_types(u.dtype, torch.float32), B.shape[1]
    x, steps, a = u.to(inner), step_sizes(delta, delta_bias, delta_softplus, inner), A.to(inner).unflatten(0, (groups, -1))
    steps, drive = (t.unflatten(1, (groups, -1)).movedim(-1, 0).unsqueeze(-1) for t in (steps, steps * x))  # (L, B, G, D/G, 1)
    b, c = (t.to(inner).movedim(-1, 0).unsqueeze(-2) for t in (B, C))  # (L, B, G, 1, N)
    h = x.new_zeros(u.shape[0], groups, A.shape[0] // groups, A.shape[1])
    if torch.jit.is_tracing():
        y = _scripted()(h, steps, drive, b, c, a)
    elif isinstance(u.shape[2], int) and u.shape[2] == 0:
        y = drive.squeeze(-1)
    elif torch.compiler.is_dynamo_compiling():  # as strict exports are
        _, y = scan(lambda h, now: _step(h, now[0], now[1], now[2], now[3], a), h, (steps, drive, b, c))
    else:  # whose other form compiles the step, and then takes lengths of one graph for those of the next
        _, y = scan_op(_step, [h], [steps, drive, b, c], (a,))
    y = y.movedim(0, -1).flatten(1, 2)
    return (y if D is None else y + D.to(inner)[:, None] * x).to(u.dtype)


def _step(h: Tensor, step: Tensor, drive: Tensor, b: Tensor, c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    h = (step * a).exp() * h + drive * b
    return h, (h * c).sum(-1)


def _loop(h: Tensor, steps: Tensor, drive: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
    out = [drive[:0].squeeze(-1)]
    for t in range(len(steps)):
        h = (steps[t] * a).exp() * h + drive[t] * b[t]
        out.append((h * c[t]).sum(-1).unsqueeze(0))
    return torch.cat(out)


@functools.cache
def _scripted() -> Callable[..., Tensor]:
    """Traces of torch.jit hold a loop only where a script has it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        return torch.jit.script(_loop)
