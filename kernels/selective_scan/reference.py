"""The selective scan in chunks: within one, the linear recurrence of all positions at once; the state goes from chunk to chunk."""
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # positions


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """See `zoo.kernels.selective_scan`. With gradients, autograd keeps the states of all positions, several times over."""
    (batch, channels, length), groups = u.shape, B.shape[1]
    inner = torch.promote_types(u.dtype, torch.float32)
    x, steps = u.to(inner), step_sizes(delta, delta_bias, delta_softplus, inner)
    a, drive = A.to(inner).unflatten(0, (groups, -1)), steps * x
    h, out = x.new_zeros(batch, groups, channels // groups, A.shape[1]), []
    for first in range(0, length, CHUNK):
        now = slice(first, min(first + CHUNK, length))
        y, h = chunk(h, by_position(steps[..., now], groups), by_position(drive[..., now], groups), a, B[..., now], C[..., now])
        out.append(y)
    y = torch.cat(out, -1) if out else drive
    return (y if D is None else y + D.to(inner)[:, None] * x).to(u.dtype)


def step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, inner: torch.dtype) -> Tensor:
    """δ, (B, D, L)."""
    steps = delta.to(inner)
    if delta_bias is not None:
        steps = steps + delta_bias.to(inner)[:, None]
    return F.softplus(steps) if delta_softplus else steps


def by_position(x: Tensor, groups: int) -> Tensor:
    """(B, D, T) → (T, B, G, D/G), in that order also in memory."""
    return x.unflatten(1, (groups, -1)).movedim(-1, 0).contiguous()


def chunk(h: Tensor, steps: Tensor, drive: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """C·h at the positions of a chunk, (B, D, T), and the state after them.

    Args:
        h: the state before, (B, G, D/G, N).
        steps, drive: δ and δ u, (T, B, G, D/G).
        a: A, (G, D/G, N).
        b, c: B and C, (B, G, N, T).
    """
    b, c = (t.to(h.dtype).movedim(-1, 0).contiguous().unsqueeze(-2) for t in (b, c))
    states = recurrence((steps.unsqueeze(-1) * a).exp(), drive.unsqueeze(-1) * b, h)
    return (states * c).sum(-1).movedim(0, -1).flatten(1, 2), states[-1]


def recurrence(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along the first axis, h_{-1} = `h`, in twice as many steps as the length has binary digits.

    Two steps of it are one of the same kind, h_t = a_t a_{t-1} h_{t-2} + (a_t b_{t-1} + b_t): so those of odd t are found, and of them
    the others. Nothing is divided, so that products of a that vanish do no harm.
    """
    length = a.shape[0]
    if length == 1:
        return a * h + b
    pairs = length // 2
    early, late = slice(0, 2 * pairs, 2), slice(1, None, 2)
    odd = recurrence(a[late] * a[early], a[late] * b[early] + b[late], h)
    even = a[::2] * torch.cat((h[None], odd[: length - pairs - 1])) + b[::2]
    states = torch.stack((even[:pairs], odd), 1).flatten(0, 1)
    return states if length == 2 * pairs else torch.cat((states, even[pairs:]))


def flops(*_: object) -> int:
    """Of the products of matrices, of which a scan has none."""
    return 0
