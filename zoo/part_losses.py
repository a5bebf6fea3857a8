"""Losses of networks that discover parts (iFAM, arXiv 2506.08915): what maps of parts should be like, without anybody's labels.

Maps m (B, M, H, W) are shares: of every patch they sum to 1 over all parts and, where it is asked for, the background, which is last.
Losses are scalars of at least float32; sources are the authors' (ananthu-aniraj/ifam, losses/equivarance_loss.py and those beside it).
"""
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, affine

from zoo.errors import InputError, near_misses
from zoo.layers.part_discovery import Parts
from zoo.models.ifam import TwoStageVisionTransformer

Presence = Literal["original", "soft_constraint", "tanh", "soft_tanh"]
EnforcedPresence = Literal["edges", "log", "linear", "mse"]
WEIGHTS = dict(stage_2=1.0, stage_1=1.0, presence=1.0, enforced_presence=2.0, total_variation=1.0, entropy=1.0, orthogonality=1.0,
               equivariance=1.0, concentration=0.0)
MAX_ANGLE, MAX_SHIFT, SCALES = 90.0, 0.11, (0.8, 1.4)  # of the images that maps are compared over
LEAST = 1e-10


def presence(maps: Tensor, kind: Presence = "original", beta: float = 0.1) -> Tensor:
    """Every part should be somewhere in the batch; maps of parts, as a rule without the background.

    With p = 3×3 means of m without padding, g_k = max_b max_xy p and ḡ the same, detached: "original" mean_k (1 - g_k);
    "soft_constraint" mean_k (1 - g_k)((1 - β) ḡ_k + β); "soft_tanh" mean_k (1 - t_k) and "tanh" mean_k (-ln t_k) with
    t_k = tanh Σ_b max_xy p. Maps of less than 3 patches in height or width are averaged over what there is.

    Raises InputError for another kind.
    """
    most = _pooled(_checked(maps, "presence")).flatten(2).amax(2)
    match kind:
        case "original":
            return (1 - most.amax(0)).mean()
        case "soft_constraint":
            found = most.amax(0)
            return ((1 - found) * ((1 - beta) * found.detach() + beta)).mean()
        case "tanh":
            return _minus_log(most.sum(0).tanh()).mean()
        case "soft_tanh":
            return (1 - most.sum(0).tanh()).mean()
    raise InputError(f"presence is one of {', '.join(Presence.__args__)}, got {kind!r}{near_misses(str(kind), Presence.__args__)}")


def enforced_presence(background: Tensor, kind: EnforcedPresence = "edges") -> Tensor:
    """The background should be somewhere in every image; its map (B, H, W).

    "edges", the authors' default: mean_b -ln max_xy (p · r), p as in `presence`, r = y² + x² with y and x from -1 to 1, over its maximum:
    near the edges. Of the mean b̄ over the image: "log" mean_b -ln b̄, "linear" mean_b (1 - b̄), "mse" mean_b (1 - b̄)².

    Raises InputError for another kind.
    """
    if background.ndim != 3:
        raise InputError(f"enforced presence is of the background's map (B, H, W), got shape {tuple(background.shape)}")
    maps = _checked(background[:, None], "enforced presence")
    match kind:
        case "edges":
            pooled = _pooled(maps)[:, 0]
            y, x = (torch.linspace(-1, 1, n, device=maps.device, dtype=maps.dtype) for n in pooled.shape[1:])
            distance = y.square()[:, None] + x.square()
            return _minus_log((pooled * (distance / distance.max())).flatten(1).amax(1)).mean()
        case "log":
            return _minus_log(maps.mean((1, 2, 3))).mean()
        case "linear":
            return 1 - maps.mean()
        case "mse":
            return (1 - maps.mean((1, 2, 3))).square().mean()
    kinds = EnforcedPresence.__args__
    raise InputError(f"enforced presence is one of {', '.join(kinds)}, got {kind!r}{near_misses(str(kind), kinds)}")


def total_variation(maps: Tensor) -> Tensor:
    """Parts should be in one piece: (Σ |Δ_y m| + Σ |Δ_x m|) / (B · H · W)."""
    maps = _checked(maps, "total variation")
    return (maps.diff(dim=2).abs().sum() + maps.diff(dim=3).abs().sum()) / (maps.numel() / maps.shape[1])


def pixel_entropy(maps: Tensor) -> Tensor:
    """Every patch should be of one part, or the background: the mean over patches of -Σ_k m ln m."""
    maps = _checked(maps, "entropy")
    return -(maps * maps.clamp(min=LEAST).log()).sum(1).mean()


def orthogonality(features: Tensor) -> Tensor:
    """Parts should look different: mean (u_i · u_j - [i = j])², u the features (B, K+1, C) of length 1."""
    if features.ndim != 3:
        raise InputError(f"orthogonality is of features (B, parts, C), got shape {tuple(features.shape)}")
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    return (unit @ unit.mT - torch.eye(unit.shape[1], device=unit.device, dtype=unit.dtype)).square().mean()


def equivariance(
    maps: Tensor, transformed: Tensor, angle: float, translate: tuple[float, float], scale: float, image_size: tuple[int, int],
) -> Tensor:
    """Maps should go where the image goes: 1 - mean over images and maps of the cosine of m and the transformed image's maps, brought back.

    Back means shifted by minus the shift in patches, then turned by -angle and scaled by 1 / scale, each by torchvision's `affine`:
    nearest, zeros outside.

    Args:
        maps, transformed: of the images, and of `affine(images, angle, translate, scale, 0)`; both (B, M, H, W), as a rule without the
            background.
        angle: degrees.
        translate: pixels, to the right and down.
        scale: factor.
        image_size: height and width in pixels.
    """
    maps, transformed = _checked(maps, "equivariance"), _checked(transformed, "equivariance")
    if maps.shape != transformed.shape:
        raise InputError(f"equivariance is of maps of one shape, got {tuple(maps.shape)} and {tuple(transformed.shape)}")
    (height, width), (rows, columns) = image_size, maps.shape[2:]
    shift = [-translate[0] * columns / width, -translate[1] * rows / height]
    back = affine(transformed, 0.0, cast(list[int], shift), 1.0, [0.0, 0.0])  # torchvision says whole numbers, and takes any
    back = affine(back, -angle, [0, 0], 1 / scale, [0.0, 0.0])
    return 1 - F.cosine_similarity(maps.flatten(2), back.flatten(2), dim=-1).mean()


def concentration(maps: Tensor) -> Tensor:
    """Parts should be small: mean of m · (((c_y - y) / W)² + ((c_x - x) / H)²), c the centroid; maps without the background.

    Rows are divided by the width and columns by the height, as in the authors' code; sums that centroids are divided by are detached.
    """
    maps = _checked(maps, "concentration")
    y, x = (torch.arange(n, device=maps.device, dtype=maps.dtype) for n in maps.shape[2:])
    mass = maps.sum((2, 3)).detach().clamp(min=LEAST)
    down = (maps * y[:, None]).sum((2, 3)) / mass
    right = (maps * x).sum((2, 3)) / mass
    distance = ((down[..., None, None] - y[:, None]) / len(x)).square() + ((right[..., None, None] - x) / len(y)).square()
    return (maps * distance).mean()


class PartDiscoveryLoss(nn.Module):
    """Runs a network that discovers parts, and tells how far it is from what iFAM trains it to (arXiv 2506.08915); to be made small.

        discovery = zoo.PartDiscoveryLoss()
        logits, loss, terms = discovery(model, images, labels)
        loss.backward()

    The sum of `weights` times: `stage_2`, criterion(logits, labels); `stage_1`, criterion(part logits, labels); `presence`,
    `equivariance` and `concentration` of the parts' maps; `enforced_presence` of the background's; `total_variation` and `entropy` of all
    maps; `orthogonality` of all features. See the functions in `zoo.part_losses`. Terms of weight 0 are not computed. For equivariance
    stage 1 runs once more, on the images turned by up to 90°, shifted by up to 11 % and scaled by 0.8 to 1.4, all alike.

    With hard masks nothing of `stage_2` reaches stage 1: the other terms train it. Nothing is left in the network.

    Args:
        weights: those that differ from the authors', which are `zoo.part_losses.WEIGHTS`.
        presence, enforced_presence: which of the kinds.
        beta: of presence's "soft_constraint".
        criterion: of logits and labels.

    Raises:
        InputError: a term or kind that there is not; in `forward`, a network that discovers no parts.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, presence: Presence = "original",
                 enforced_presence: EnforcedPresence = "edges", beta: float = 0.1,
                 criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy):
        super().__init__()
        for name in weights or ():
            if name not in WEIGHTS:
                raise InputError(f"there is no term {name!r}{near_misses(name, WEIGHTS)}; terms are {', '.join(WEIGHTS)}")
        for given, kinds in ((presence, Presence), (enforced_presence, EnforcedPresence)):
            if given not in kinds.__args__:
                raise InputError(f"presence and enforced_presence are of a kind, here one of {', '.join(kinds.__args__)}, got {given!r}")
        self.weights: dict[str, float] = {**WEIGHTS, **(weights or {})}
        self.presence: Presence = presence
        self.enforced_presence: EnforcedPresence = enforced_presence
        self.beta, self.criterion = beta, criterion

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What model(images) returns, the loss, a scalar of at least float32, and its terms before weighting; images (B, C, H, W)."""
        with discoveries(model) as found:
            logits = model(images)
        terms = {"stage_2": self.criterion(logits, labels)} if self.weights["stage_2"] else {}
        terms |= self.of_parts(found, images, labels)
        return logits, self.total(terms), terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def of_parts(self, found: "Discovery", images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms but for stage 2's, before weighting, of what a network found in these images."""
        if found.parts is None or found.logits is None:
            raise InputError("the network has not run, so that there are no parts of which a loss could be made")
        parts, logits = found.parts, found.logits
        maps, of_parts = parts.maps, parts.maps[:, :-1]
        ways: dict[str, Callable[[], Tensor]] = dict(
            stage_1=lambda: self.criterion(logits, labels), presence=lambda: presence(of_parts, self.presence, self.beta),
            enforced_presence=lambda: enforced_presence(maps[:, -1], self.enforced_presence),
            total_variation=lambda: total_variation(maps), entropy=lambda: pixel_entropy(maps),
            orthogonality=lambda: orthogonality(parts.features), equivariance=lambda: _moved(found.network, images, of_parts),
            concentration=lambda: concentration(of_parts))
        return {name: way() for name, way in ways.items() if self.weights[name]}

    def extra_repr(self) -> str:
        return f"weights={self.weights}, presence={self.presence!r}, enforced_presence={self.enforced_presence!r}"


class Discovery:
    """What a network found when it last ran within `discoveries`."""

    def __init__(self, network: TwoStageVisionTransformer):
        self.network = network
        self.parts: Parts | None = None
        self.logits: Tensor | None = None


@contextlib.contextmanager
def discoveries(model: nn.Module) -> Iterator[Discovery]:
    """Collects parts and part logits of the network that discovers parts, which is `model` or inside it, as it runs."""
    networks = [module for module in model.modules() if isinstance(module, TwoStageVisionTransformer)]
    if len(networks) != 1:
        raise InputError(f"{type(model).__name__} is, or holds, {len(networks)} networks that discover parts, and the part discovery loss "
                         "is for one; zoo.list_models(mechanism='parts') tells their names")
    found = Discovery(networks[0])
    networks[0].take_parts = partial(_take, found)
    try:
        yield found
    finally:
        networks[0].take_parts = None


def _take(found: Discovery, parts: Parts, logits: Tensor) -> None:
    found.parts, found.logits = parts, logits


def _moved(network: TwoStageVisionTransformer, images: Tensor, maps: Tensor) -> Tensor:
    """Equivariance of the network's maps of parts under a random transformation."""
    drawn = torch.rand(4).tolist()
    angle, across, down = ((2 * share - 1) * most for share, most in zip(drawn, (MAX_ANGLE, MAX_SHIFT, MAX_SHIFT), strict=False))
    height, width = images.shape[2:]
    translate = round(across * width), round(down * height)
    scale = SCALES[0] + drawn[3] * (SCALES[1] - SCALES[0])
    moved = affine(images, angle, list(translate), scale, [0.0, 0.0], InterpolationMode.BILINEAR)
    parts, _ = network.discover(moved)
    return equivariance(maps, parts.maps[:, :-1], angle, translate, scale, (height, width))


def _checked(maps: Tensor, loss: str) -> Tensor:
    if maps.ndim != 4 or not math.prod(maps.shape):
        raise InputError(f"{loss} is of maps (B, parts, H, W), got shape {tuple(maps.shape)}")
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def _pooled(maps: Tensor) -> Tensor:
    return F.avg_pool2d(maps, (min(3, maps.shape[2]), min(3, maps.shape[3])), 1)


def _minus_log(x: Tensor) -> Tensor:
    """Binary cross entropy with 1; torch's is refused by autocast."""
    return -x.clamp(min=torch.finfo(x.dtype).tiny).log()
