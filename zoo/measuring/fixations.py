"""The metrics of fixation prediction, for one picture at a time."""
import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.fixations import correlation, divergence, scanpath, similarity


def measured(prediction: Tensor, density: Tensor, fixations: Tensor | None = None) -> dict[str, float]:
    """`kl`, `cc` and `sim` of one picture's map (H, W), which is not negative, and where fixations are known and not none `nss` and `auc`.

    See `zoo.fixations`, and `auc_judd`. Raises InputError for maps of different sizes.
    """
    p, y = (m.double()[None] for m in (prediction, density))
    found = {"kl": divergence(p, y).item(), "cc": correlation(p, y).item(), "sim": similarity(p, y).item()}
    if fixations is not None and bool((fixations > 0).any()):
        found |= {"nss": scanpath(p, fixations[None]).item(), "auc": auc_judd(prediction, fixations)}
    return found


def auc_judd(prediction: Tensor, fixations: Tensor) -> float:
    """AUC-Judd of a map (H, W): the area under the curve of hits over false alarms as the threshold goes down the fixated values.

    With the n fixated values, descending, as thresholds, k from 0, and N pixels: hits are (k + 1) / n, false alarms
    (#{p ≥ threshold_k} - k - 1) / (N - n); the curve begins at (0, 0) and ends at (1, 1), and trapezoids are added.

    Difference from the authors' code (Arhosseini77/SUM, utils/loss_function.py): no jitter of 1e-7 decides between values that are alike.

    Raises InputError for maps of different sizes, and where no pixel is fixated or all are.
    """
    if prediction.shape != fixations.shape:
        raise InputError(f"fixations are of shape {tuple(fixations.shape)}, and the predicted map of {tuple(prediction.shape)}")
    p, fixated = prediction.flatten(), fixations.flatten() > 0
    n, size = int(fixated.sum()), p.numel()
    if not 0 < n < size:
        raise InputError(f"{n} of {size} pixels are fixated, and the area under the curve needs some that are and some that are not")
    thresholds = p[fixated].sort(descending=True).values
    ranked = p.sort().values
    above = size - torch.searchsorted(ranked, thresholds)  # pixels of at least each threshold
    k = torch.arange(1, n + 1, device=p.device)
    hits, alarms = k.double() / n, (above - k).double() / (size - n)
    ends = hits.new_tensor([0.0, 1.0])
    return torch.trapezoid(torch.cat([ends[:1], hits, ends[1:]]), torch.cat([ends[:1], alarms, ends[1:]])).item()
