"""α-entmax in plain PyTorch: by sorting for α = 1.5 and 2, by bisection and Newton's steps for any α."""
import torch
from torch import Tensor

HALVINGS = 16  # an interval of at most ln N shrinks below 2e-4, from where Newton's steps square the error
STEPS = 3  # so that derivatives up to the seventh are those of the exact solution


def entmax(z: Tensor, alpha: float | Tensor) -> Tensor:
    """See `zoo.kernels.entmax`."""
    x = with_largest_zero(z)
    if not isinstance(alpha, Tensor) and alpha in (1.5, 2.0):
        p = by_sorting(x, alpha)
    else:
        p = by_bisection(x, torch.as_tensor(alpha, dtype=x.dtype, device=x.device))
    return torch.where(z == -torch.inf, 0, p).to(z.dtype)


def with_largest_zero(z: Tensor) -> Tensor:
    """z in at least float32, less its largest of a row."""
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    return x - x.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)  # not -∞ - -∞ where all are masked


def by_sorting(x: Tensor, alpha: float) -> Tensor:
    """p of logits whose largest is 0, exactly, for α = 1.5 or 2."""
    x = (x * (alpha - 1)).clamp_min(-2)  # from -1 on there is no weight, and -∞ would spoil the sums
    ordered = x.sort(-1, descending=True).values
    counts = torch.arange(1, x.shape[-1] + 1, device=x.device).to(x.dtype)
    means, squares = ordered.cumsum(-1) / counts, ordered.square().cumsum(-1) / counts

    def threshold(mean: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """τ if the `count` largest are the support."""
        if alpha == 2:
            return mean - 1 / count
        return mean - (1 / count - (square - mean.square())).clamp_min(0).sqrt()

    with torch.no_grad():
        last = (threshold(means, squares, counts) < ordered).sum(-1, keepdim=True) - 1
    tau = threshold(means.gather(-1, last), squares.gather(-1, last), counts[last])
    p = (x - tau).relu()  # which has no slope at 0
    return p if alpha == 2 else p.square()


def by_bisection(x: Tensor, alpha: Tensor) -> Tensor:
    """p of logits whose largest is 0, as [1 + (α - 1)(x - s)]₊^{1/(α-1)}, whose s = (τ + 1) / (α - 1) stays finite as α nears 1."""
    fixed, fixed_alpha = x.detach(), alpha.detach()
    count = torch.ones_like(fixed).sum(-1, keepdim=True)
    low, high = torch.zeros_like(count), torch.expm1((1 - fixed_alpha) * count.log()) / (1 - fixed_alpha)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_low = _powers(fixed - middle, fixed_alpha)[0].sum(-1, keepdim=True) >= 1
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    s = low  # from below, as the sum is convex in s
    for _ in range(STEPS):
        p, slopes = _powers(x - s, alpha)
        s = s + (p.sum(-1, keepdim=True) - 1) / slopes.sum(-1, keepdim=True)
    return _powers(x - s, alpha)[0]


def _powers(y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """p = [1 + (α - 1) y]₊^{1/(α-1)}, and its derivative in y, p^{2-α} on the support."""
    inside = (alpha - 1) * y > -1
    logarithm = torch.log1p((alpha - 1) * torch.where(inside, y, 0)) / (alpha - 1)
    return torch.where(inside, logarithm.exp(), 0), torch.where(inside, ((2 - alpha) * logarithm).exp(), 0)


def flops(*_: object, **__: object) -> int:
    """It holds no products of matrices."""
    return 0
