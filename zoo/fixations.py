"""How close a predicted map of fixations comes to where people looked: what the field measures, and the losses made of it.

Maps are (B, 1, H, W) or (B, H, W), of any scale unless said; every function gives one number for each picture, (B,), of at least float32,
and has gradients. `density` is a map of fixations, blurred, and not negative; `fixations` is above 0 where somebody looked.
"""
import torch
from torch import Tensor, nn

from zoo.errors import InputError

__all__ = ["FixationDivergenceLoss", "FixationLoss", "correlation", "divergence", "scanpath", "similarity"]

TINY = 2.2204e-16


def divergence(prediction: Tensor, density: Tensor, eps: float = TINY) -> Tensor:
    """KL: Σ y log(ε + y / (p + ε)), p and y the maps over ε + their sums; prediction not negative. The smaller the better.

    With ε = 1e-7 that of MSI-Net (arXiv 1902.06634, eq. 1; alexanderkroner/saliency, loss.py), with 2.2204e-16 that of SUM
    (Arhosseini77/SUM, utils/loss_function.py).
    """
    p, y = _flat(prediction, density)
    p, y = (m / (eps + m.sum(1, keepdim=True)) for m in (p, y))
    return (y * torch.log(eps + y / (p + eps))).sum(1)


def correlation(prediction: Tensor, density: Tensor) -> Tensor:
    """CC: Pearson's correlation of the maps, from -1 to 1; 0 where one of them is the same everywhere. The larger the better."""
    p, y = (m - m.mean(1, keepdim=True) for m in _flat(prediction, density))
    return (p * y).sum(1) / _norms(p, y)


def similarity(prediction: Tensor, density: Tensor) -> Tensor:
    """SIM: Σ min(p, y) of the maps, each scaled to reach from 0 to 1 and divided by its sum; from 0 to 1. The larger the better.

    A map that is the same everywhere has nothing in common with any.
    """
    maps = []
    for m in _flat(prediction, density):
        m = m - m.amin(1, keepdim=True)
        m = m / m.amax(1, keepdim=True).clamp(min=TINY)
        maps.append(m / m.sum(1, keepdim=True).clamp(min=TINY))
    return torch.minimum(*maps).sum(1)


def scanpath(prediction: Tensor, fixations: Tensor) -> Tensor:
    """NSS, normalised scanpath saliency: the mean over fixated pixels of (p - mean p) / std p, with the unbiased deviation.

    0 is chance; the larger the better. Of a picture without fixations it is 0, and so it is of a map that is the same everywhere.
    """
    p, f = _flat(prediction, fixations)
    f = (f > 0).to(p.dtype)
    p = p - p.mean(1, keepdim=True)
    deviation = (_squared(p).sum(1) / max(1, p.shape[1] - 1)).clamp(min=TINY).sqrt()
    return (p * f).sum(1) / deviation / f.sum(1).clamp(min=1)


class FixationDivergenceLoss(nn.Module):
    """The mean over pictures of `divergence` (MSI-Net's loss).

        zoo.FixationDivergenceLoss()(msinet(images), densities).backward()

    Args:
        eps: MSI-Net's 1e-7.

    Raises:
        ValueError: eps that is not above 0; maps of different shapes.
    """

    def __init__(self, eps: float = 1e-7):
        super().__init__()
        if not eps > 0:
            raise InputError(f"eps must be above 0, got {eps}")
        self.eps = eps

    def forward(self, prediction: Tensor, density: Tensor, fixations: Tensor | None = None) -> Tensor:
        """A scalar; fixations, which other losses look at, do not matter."""
        return divergence(prediction, density, self.eps).mean()

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class FixationLoss(nn.Module):
    """SUM's loss (arXiv 2406.17815): the mean over pictures of 10 KL - 2 CC - SIM - NSS + 5 MSE, of a map and a density from 0 to 1.

    Args:
        kl, cc, sim, nss, mse: the weights. Where no fixations are given, there is no NSS.

    Differences from the authors' code (Arhosseini77/SUM, train.py): maps without variance give 0 and no NaN.

    Raises:
        ValueError: in `forward`, maps of different shapes.
    """

    def __init__(self, kl: float = 10.0, cc: float = 2.0, sim: float = 1.0, nss: float = 1.0, mse: float = 5.0):
        super().__init__()
        self.kl, self.cc, self.sim, self.nss, self.mse = kl, cc, sim, nss, mse

    def forward(self, prediction: Tensor, density: Tensor, fixations: Tensor | None = None) -> Tensor:
        """A scalar."""
        p, y = _flat(prediction, density)
        loss = self.kl * divergence(p, y) - self.cc * correlation(p, y) - self.sim * similarity(p, y) + self.mse * _squared(p - y).mean(1)
        return (loss if fixations is None else loss - self.nss * scanpath(prediction, fixations)).mean()

    def extra_repr(self) -> str:
        return f"kl={self.kl}, cc={self.cc}, sim={self.sim}, nss={self.nss}, mse={self.mse}"


def _flat(prediction: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(B, positions), of at least float32."""
    if prediction.shape != other.shape or prediction.ndim < 2:
        raise InputError(f"the map of fixations is of shape {tuple(other.shape)}, and the predicted map of {tuple(prediction.shape)}; they "
                         "must be of one, (B, 1, H, W)")
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.to(dtype).flatten(1), other.to(dtype).flatten(1)


def _squared(x: Tensor) -> Tensor:
    return x * x


def _norms(p: Tensor, y: Tensor) -> Tensor:
    return (_squared(p).sum(1) * _squared(y).sum(1)).clamp(min=1e-30).sqrt()
