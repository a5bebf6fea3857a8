from torch import Tensor

from .._backends import choose, public_operator
from .._checking import FLOATING
from . import newton, reference

__all__ = ["entmax"]


@public_operator
def entmax(z: Tensor, alpha: float | Tensor = 1.5, backend: str | None = None) -> Tensor:
    """α-entmax over the last dimension, between softmax (α → 1) and sparsemax (α = 2) (arXiv 1905.05702).

        p = [(α - 1) z - τ]₊^{1/(α-1)},  τ so that Σ p = 1

    Entries far enough below the largest are exactly 0.

    Args:
        z: logits (…, N), float32, float64, float16, bfloat16; computed in at least float32. -∞ masks an entry, which gets 0; where all
            are masked, all get 0.
        alpha: a number above 1 and at most 2, or a tensor of such numbers, floating, of a shape that broadcasts to (…, 1): it is
            learned where it requires gradients. Those of a tensor are not checked.
        backend: "reference" (plain PyTorch: by sorting where α is 1.5 or 2, else by bisection), "newton" (the same, in blocks of rows), see
            `zoo.kernels`.

    Returns:
        p (…, N) in the dtype of z, of which alone the backward passes are made. Differentiable any number of times in z and alpha.

    Raises:
        ValueError, TypeError: arguments that do not fit, a number alpha out of bounds: α = 1 is softmax.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"entmax: z must be a tensor (…, N), got {type(z).__name__}")
    if z.dtype not in FLOATING:
        raise TypeError(f"entmax: z must be of a floating dtype, float32, float64, float16 or bfloat16, got {z.dtype}")
    if z.ndim < 1 or z.shape[-1] == 0:
        raise ValueError(f"entmax: z must be (…, N), N at least 1, got shape {tuple(z.shape)}")
    if isinstance(alpha, Tensor):
        if alpha.dtype not in FLOATING:
            raise TypeError(f"entmax: alpha must be of a floating dtype, got {alpha.dtype}")
        if alpha.device != z.device:
            raise ValueError(f"entmax: alpha must be on the device of z ({z.device}), got {alpha.device}")
        fits = alpha.ndim <= z.ndim and all(a in (1, n) for a, n in zip(reversed(alpha.shape), (1, *reversed(z.shape[:-1])), strict=False))
        if not fits:
            raise ValueError(f"entmax: alpha must broadcast to {(*z.shape[:-1], 1)}, got {tuple(alpha.shape)}")
    elif isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"entmax: alpha must be a number or a tensor, got {alpha!r}")
    elif not 1 < alpha <= 2:
        raise ValueError(f"entmax: alpha must be above 1 (where it is softmax) and at most 2, got {alpha}")
    return {"reference": reference, "newton": newton}[choose("entmax", backend, z, lambda: "newton")].entmax(z, alpha)
