"""Parts that a network discovers by itself, and the mask of the patches that belong to any (iFAM, arXiv 2506.08915, stage 1)."""
import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module

NOISE = ("training", "always")


class Parts(NamedTuple):
    """What `PartDiscovery` finds in B images of H × W patches, of K parts and, last, the background.

    `maps` (B, K+1, H, W): how much each patch belongs to each; of every patch they sum to 1. `features` (B, K+1, C): of each, normalised.
    `soft_mask` (B, 2, H, W): how much a patch is of its likeliest part, and of the background. `mask` (B, H, W): 1 where the former is
    at least the latter, else 0, with the gradient of the sum over parts. `products` (B, K+1, H, W): of patches and prototypes.
    """

    maps: Tensor
    features: Tensor
    soft_mask: Tensor
    mask: Tensor
    products: Tensor


@notrace_module
class PartDiscovery(nn.Module):
    """Assigns each patch of a map to one of K parts or the background, by learned prototypes (iFAM, arXiv 2506.08915).

        z_kn  = -‖y_n - w_k‖²,  maps = softmax_k(z + noise),  f_k = mean_n maps_kn y_n
        features = LayerNorm over all C · (K+1) numbers of f together
        soft  = softmax_k(z + other noise),  foreground_n = max_parts soft_kn · dropout,  background_n = soft_(K+1)n
        mask_n = [foreground_n ≥ background_n] + Σ_parts soft_kn - (the same, detached)

    (B, H, W, C) → `Parts`, any floating dtype; maps and masks are of at least float32. Noise is Gumbel's, -ln of exponential draws: patches
    are then assigned at random, in the proportions of softmax(z). `zoo.capture` gets `maps`, `mask` and `soft_mask`.

    Args:
        dim: C.
        num_parts: K.
        noise: "training", or "always", as the authors have it, where two passes over one image differ in evaluation, too.
        noisy_maps: whether `maps` get noise when masks do.
        mask_drop_rate: in training, parts that a mask lacks.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (ananthu-aniraj/ifam, models/individual_landmark_vit_2_stage_mod.py): noise, in training only by
    default; ‖y_n‖² is not computed, as softmax cancels it; `prototypes` are theirs `fc_landmarks`.

    Raises:
        ValueError: arguments outside what is said above, at construction; another shape, in `forward`.
    """

    def __init__(
        self, dim: int, num_parts: int = 8, noise: str = "training", noisy_maps: bool = True, mask_drop_rate: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(dim, num_parts) < 1:
            raise ValueError(f"dim and num_parts must be at least 1, got {dim} and {num_parts}")
        if noise not in NOISE:
            raise ValueError(f"noise must be one of {', '.join(NOISE)}, got {noise!r}")
        if not 0 <= mask_drop_rate < 1:
            raise ValueError(f"mask_drop_rate must be at least 0 and less than 1, got {mask_drop_rate}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim, self.num_parts, self.noise, self.noisy_maps, self.mask_drop_rate = dim, num_parts, noise, noisy_maps, mask_drop_rate
        self.prototypes = nn.Parameter(torch.empty(num_parts + 1, dim, **dd))
        self.modulation = nn.LayerNorm([dim, num_parts + 1], **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prototypes, -self.dim**-0.5, self.dim**-0.5)

    def forward(self, x: Tensor) -> Parts:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"PartDiscovery: x must be (B, H, W, {self.dim}), got shape {tuple(x.shape)}")
        exact = torch.promote_types(x.dtype, torch.float32)
        with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):  # which knows no meta tensors
            y, w = x.to(exact), self.prototypes.to(exact)
            products = (y @ w.mT).permute(0, 3, 1, 2)
            z = 2 * products - w.square().sum(-1)[:, None, None]
            maps = self._softmax(z, self.noisy_maps)
            features = maps.flatten(2) @ y.flatten(1, 2) / (x.shape[1] * x.shape[2])
        features = self.modulation(features.to(x.dtype).mT).mT
        soft = self._softmax(z, True)
        parts, background = soft[:, :-1], soft[:, -1]
        if self.training and self.mask_drop_rate:  # what is kept is as it was
            parts = F.dropout2d(parts, self.mask_drop_rate) * (1 - self.mask_drop_rate)
        foreground, likeliness = parts.amax(1), parts.sum(1)
        mask = (foreground >= background).to(exact) + (likeliness - likeliness.detach())
        found = Parts(maps, features, torch.stack([foreground, background], 1), mask, products)
        report(self, maps=maps, mask=mask, soft_mask=found.soft_mask)
        return found

    def _softmax(self, z: Tensor, noisy: bool) -> Tensor:
        noisy = noisy and (self.training or self.noise == "always")
        return (z - self.exponential(z).log() if noisy else z).softmax(1)

    def exponential(self, z: Tensor) -> Tensor:
        """Draws of z's shape: first those of the maps, then those of the mask."""
        return torch.empty_like(z).exponential_()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_parts={self.num_parts}, noise={self.noise!r}"
