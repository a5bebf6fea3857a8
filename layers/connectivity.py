"""Masks as the connections of neighbouring pixels, and back (BiconNet, arXiv 2103.00334; DconnNet, arXiv 2304.00145)."""
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor

# Where a pixel's neighbours lie: shifts of the content by (down, right). Number 7 - i is opposite to i.
DIRECTIONS = ((1, 1), (1, 0), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, 0), (-1, -1))
NEIGHBOURS = len(DIRECTIONS)
OUTSIDE = -100.0  # the logit of a connection to what lies outside: a probability of 0 in float32
_CUTS = {1: slice(None, -2), 0: slice(1, -1), -1: slice(2, None)}  # of what has a border of 1, to shift by as much


def connectivity_target(masks: Tensor) -> Tensor:
    """Which of its 8 neighbours a pixel of a mask is connected to: (B, C, H, W) → (B, 8 C, H, W), the 8 of a class together.

    con_i = m · shift_i(m), i = 0 … 7 (BiconNet, section 3.1), shift_i moves the content down and right by (1, 1), (1, 0), (1, -1),
    (0, 1), (0, -1), (-1, 1), (-1, 0), (-1, -1), and zeros come in: a single pixel, and the outside, are connected to nothing.

    Args:
        masks: one for each class, of any dtype, 1 inside and 0 outside.

    The authors' code (Zyun-Y/BiconNets, general/train/utils_bicon.py, sal2conn) takes one mask after the other.

    Raises:
        ValueError: masks of another number of dimensions.
    """
    _check(masks, "masks", 1)
    return (masks[:, :, None] * _shifted(masks[:, :, None].expand(-1, -1, NEIGHBOURS, -1, -1))).flatten(1, 2)


def bilateral_voting(maps: Tensor) -> tuple[Tensor, Tensor]:
    """What both ends of a connection say of it, and masks made of that: (B, 8 C, H, W) → (B, C, H, W) and (B, C, 8, H, W).

    v_i = c_i · shift_i(c_{7-i}) and mask = max_i v_i (BiconNet, section 3.3), directions as in `connectivity_target`, with zeros outside.

    Args:
        maps: connections c, the 8 of a class together: probabilities, or, to compare classes as DconnNet's authors do, logits, of which two
            negative ones make a positive vote.

    Returns:
        masks, then votes.

    The authors' code (Zyun-Y/DconnNet, connect_loss.py, Bilateral_voting) shifts by products with matrices of H × H and W × W.

    Raises:
        ValueError: maps of another number of dimensions, or of channels that 8 does not divide.
    """
    _check(maps, "maps", NEIGHBOURS)
    given = maps.unflatten(1, (-1, NEIGHBOURS))
    votes = given * _shifted(given.flip(2))
    return votes.amax(2), votes


@register_notrace_function
def class_logits(maps: Tensor, num_classes: int) -> Tensor:
    """Logits of classes by the votes of connections, logits z: (B, 8 K, H, W) → (B, num_classes, H, W).

    One class, K = 1: the logit of the probability max_i σ(z_i) · shift_i(σ(z_{7-i})), with the limits of float32.
    Two, K = 1: a background, whose logit is 0, and a thing with the former: their softmax is that probability.
    More, K = num_classes: max_i z_i · shift_i(z_{7-i}), as DconnNet's authors compare classes.

    Raises:
        ValueError: maps of another number of channels than 8 K.
    """
    channels = map_channels(num_classes)
    if maps.ndim != 4 or maps.shape[1] != channels:
        raise ValueError(f"maps must be (B, {channels}, H, W) for {num_classes} classes, got shape {tuple(maps.shape)}")
    if num_classes > 2:
        return bilateral_voting(maps)[0]
    z = (maps if maps.dtype == torch.float64 else maps.float())[:, None]
    other = _shifted(z.flip(2), OUTSIDE)
    # σ(a) σ(b) has the logit -log(exp(-a) + exp(-b) + exp(-a - b))
    voted = -torch.stack([-z, -other, -z - other]).logsumexp(0).amin(2).to(maps.dtype)
    return voted if num_classes == 1 else torch.cat([torch.zeros_like(voted), voted], 1)


def map_channels(num_classes: int) -> int:
    """Of the connections of so many classes: 8 of each, but of two classes, a background and a thing, those of the thing alone."""
    return NEIGHBOURS * (1 if num_classes == 2 else num_classes)


def _shifted(maps: Tensor, outside: float = 0.0) -> Tensor:
    """(B, C, 8, H, W): every map shifted in its direction."""
    bordered = F.pad(maps, (1, 1, 1, 1), value=outside)
    return torch.stack([bordered[:, :, i, _CUTS[down], _CUTS[right]] for i, (down, right) in enumerate(DIRECTIONS)], 2)


def _check(x: Tensor, name: str, multiple: int) -> None:
    if x.ndim != 4 or x.shape[1] % multiple:
        raise ValueError(f"{name} must be (B, {multiple if multiple > 1 else ''}{' ' * (multiple > 1)}C, H, W), got shape {tuple(x.shape)}")
