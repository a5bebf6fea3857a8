"""Attention of InSPyReNet (arXiv 2209.09475): along the axes of maps, and to the context of a coarser answer."""
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module
from .image_pyramid import to_size

Axis = Literal["h", "w"]
Reshapes = Literal["as_trained", "meant"]


class ConvNorm(nn.Module):
    """A convolution without bias that keeps the map's size, batch norm, and ReLU where asked."""

    def __init__(self, dim: int, out_dim: int, kernel: int | tuple[int, int], dilation: int = 1, relu: bool = False, **dd: Any):
        super().__init__()
        sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = dilation * (sizes[0] // 2), dilation * (sizes[1] // 2)  # which counters of products know better than "same"
        self.conv = nn.Conv2d(dim, out_dim, kernel, padding=padding, dilation=dilation, bias=False, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)
        self.act = nn.ReLU() if relu else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@notrace_module
class AxialAttention(nn.Module):
    """Positions along one axis of a map attend to each other, whole rows or columns at once (arXiv 2209.09475, section 3.2).

    With q, k and v of 1×1 convolutions with batch norm, dim / 8, dim / 8 and dim channels, reshaped to (B, ·, n), n = W along "w" and H
    along "h":

        out = γ · v Aᵀ + x,   A = softmax(qᵀ k)  over the last axis of (n, n), not scaled

    (B, dim, H, W) → (B, dim, H, W); γ, a number, is 0 at first. `zoo.capture` gets the `attention` (B, n, n).

    The authors reshape (B, C, H, W) as it lies in memory: for "h" to (B, C · W, H), whose last axis is not the rows. On square maps that is
    attention along W, as of "w"; on others it mixes both axes. Their weights were trained with it.

    Args:
        dim: C, at least 8.
        axis: "h" or "w".
        reshapes: "as_trained", as above, or "meant": along "h" the rows attend to each other.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (plemeri/InSPyReNet, lib/modules/layers.py: SelfAttention): none with reshapes="as_trained"; maps
    with channels last, which theirs refuses, are copied.

    Raises:
        ValueError: arguments outside what is said above, at construction; a map of other channels, in `forward`.
    """

    def __init__(
        self, dim: int, axis: Axis = "w", reshapes: Reshapes = "as_trained",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 8:
            raise ValueError(f"dim must be at least 8, got {dim}")
        if axis not in Axis.__args__:
            raise ValueError(f"axis must be h or w, got {axis!r}")
        check_reshapes(reshapes)
        self.dim, self.reshapes = dim, reshapes
        self.axis: Axis = axis
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.query, self.key, self.value = (ConvNorm(dim, out_dim, 1, **dd) for out_dim in (dim // 8, dim // 8, dim))
        self.gamma = nn.Parameter(torch.zeros(1, **dd))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        check_map("AxialAttention: x", x, self.dim)
        if self.axis == "h" and self.reshapes == "meant":
            return self._attended(x.transpose(2, 3), "w").transpose(2, 3)
        return self._attended(x, self.axis)

    def _attended(self, x: Tensor, axis: Axis) -> Tensor:
        q, k, v = (_lines(y, axis) for y in (self.query(x), self.key(x), self.value(x)))
        attention = (q.mT @ k).softmax(-1).to(v.dtype)
        report(self, attention=attention)
        return self.gamma.to(x.dtype) * (v @ attention.mT).to(x.dtype).reshape(x.shape) + x

    def extra_repr(self) -> str:
        return f"dim={self.dim}, axis={self.axis!r}, reshapes={self.reshapes!r}"


def _lines(x: Tensor, axis: Axis) -> Tensor:
    """(B, C, H, W) as it lies in memory, channels first → (B, C · H, W), or along "h" (B, C · W, H)."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels * height, width) if axis == "w" else x.reshape(batch, channels * width, height)


class AxialKernel(nn.Module):
    """A branch of `PyramidAxialAttention`: 1×1, 1×r and r×1, the sum of attention along both axes, 3×3 of dilation r."""

    def __init__(self, dim: int, out_dim: int, size: int, reshapes: Reshapes, **dd: Any):
        super().__init__()
        self.conv0 = ConvNorm(dim, out_dim, 1, **dd)
        self.conv1 = ConvNorm(out_dim, out_dim, (1, size), **dd)
        self.conv2 = ConvNorm(out_dim, out_dim, (size, 1), **dd)
        self.conv3 = ConvNorm(out_dim, out_dim, 3, dilation=size, **dd)
        self.rows, self.columns = (AxialAttention(out_dim, axis, reshapes, **dd) for axis in Axis.__args__)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(self.conv0(x)))
        return self.conv3(self.rows(x) + self.columns(x))


@notrace_module
class PyramidAxialAttention(nn.Module):
    """What a map holds at several reaches, each with attention along its axes: InSPyReNet's encoder of context (arXiv 2209.09475, 3.2).

        out = ReLU(CB₃([CB₁(x), branch₃(x), branch₅(x), branch₇(x)]) + CB₁(x))
        branch_r(x) = CB₃,dilated by r (h(y) + w(y)),   y = CB_r×1(CB_1×r(CB₁(x)))

    CB_k is a k×k convolution without bias, with batch norm; h and w are `AxialAttention` along either axis, which `zoo.capture` finds as
    `branches.I.rows` and `branches.I.columns`. (B, dim, H, W) → (B, out_dim, H, W).

    Args:
        dim: channels of the map.
        out_dim: channels of the output and of all branches, at least 8; default dim.
        sizes: r of the branches.
        reshapes: see `AxialAttention`.
        device, dtype: of the parameters, as in torch.

    It is the authors' PAA_e (plemeri/InSPyReNet, lib/modules/context_module.py). Raises ValueError as `AxialAttention`.
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, sizes: Sequence[int] = (3, 5, 7), reshapes: Reshapes = "as_trained",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if not sizes or min(sizes) < 1 or any(size % 2 == 0 for size in sizes):
            raise ValueError(f"sizes must be odd numbers, got {tuple(sizes)}")
        self.dim = dim
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.narrow = ConvNorm(dim, out_dim, 1, **dd)
        self.branches = nn.ModuleList(AxialKernel(dim, out_dim, size, reshapes, **dd) for size in sizes)
        self.fuse = ConvNorm(out_dim * (1 + len(sizes)), out_dim, 3, **dd)
        self.shortcut = ConvNorm(dim, out_dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_map("PyramidAxialAttention: x", x, self.dim)
        return F.relu(self.fuse(torch.cat([self.narrow(x), *(branch(x) for branch in self.branches)], 1)) + self.shortcut(x))


@notrace_module
class ScaleInvariantContextAttention(nn.Module):
    """Positions attend to the few contexts that a coarser answer divides the map into (SICA, arXiv 2209.09475, section 3.3).

    Of the answer's logits s and, where there are, l, what its pyramid adds to it, interpolated to x's size, and numbers t, t' that are
    learned, 0.5 at first:

        p = σ(s) - t,   l' = σ(l) - t',   maps: p₊, (-p)₊, t - |p|, and l'₊, (-l')₊,   z₊ = min(max(z, 0), 1)
        contexts  c_j = Σ_n maps_jn x_n,  of maps and x interpolated to `size`
        y = CBR₃(Σ_j softmax_j(q kᵀ_j / √d) v_j),   q = CBR₃(CBR₃(x)),   k, v = CBR₁(CBR₁(c))
        features = CBR₃(CBR₃([x, y])),   logits = CB₁(features)

    CB_k is a k×k convolution without bias, with batch norm, and CBR_k with ReLU. x (B, dim, H, W), s and l (B, 1, ·, ·) of any sizes →
    features (B, out_dim, H, W) and logits (B, 1, H, W). `zoo.capture` gets the `attention` (B, contexts, H, W).

    The authors read the memory of x, (B, dim, n), as (B, n, dim) where contexts are summed: a context's numbers are of many channels. Their
    weights were trained with it.

    Args:
        dim, out_dim: channels of x, and of all that is made of it.
        size: (height, width) at which contexts are summed, whatever the input's: what was seen in training.
        laplacian: whether there is l.
        reshapes: "as_trained", as above, or "meant": every context has the channels of x.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (plemeri/InSPyReNet, lib/modules/attention_module.py: SICA): contexts are summed in float32 at least,
    as their sums over all positions exceed what float16 holds.

    Raises:
        ValueError: an unknown value of reshapes, at construction; in `forward`, a map of other channels, or l where there is none, or none
            where there is.
    """

    def __init__(
        self, dim: int, out_dim: int, size: tuple[int, int], laplacian: bool = False, reshapes: Reshapes = "as_trained",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_reshapes(reshapes)
        self.dim, self.size, self.reshapes = dim, tuple(size), reshapes
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.threshold = nn.Parameter(torch.empty(1, **dd))
        self.laplacian_threshold = nn.Parameter(torch.empty(1, **dd)) if laplacian else None
        self.query, self.key, self.value = (
            nn.Sequential(ConvNorm(dim, out_dim, kernel, relu=True, **dd), ConvNorm(out_dim, out_dim, kernel, relu=True, **dd))
            for kernel in (3, 1, 1))
        self.out1 = ConvNorm(out_dim, out_dim, 3, relu=True, **dd)
        self.out2 = ConvNorm(dim + out_dim, out_dim, 3, relu=True, **dd)
        self.out3 = ConvNorm(out_dim, out_dim, 3, relu=True, **dd)
        self.logits = ConvNorm(out_dim, 1, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for threshold in (self.threshold, self.laplacian_threshold):
            if threshold is not None:
                nn.init.constant_(threshold, 0.5)

    def forward(self, x: Tensor, saliency: Tensor, laplacian: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_map("ScaleInvariantContextAttention: x", x, self.dim)
        if (laplacian is None) != (self.laplacian_threshold is None):
            raise ValueError(f"laplacian must be {'None' if self.laplacian_threshold is None else 'a map'}, as the layer was made, got "
                             f"{'None' if laplacian is None else f'shape {tuple(laplacian.shape)}'}")
        q = self.query(x).flatten(2)
        context = self._contexts(x, saliency, laplacian)[..., None]
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            k, v = (branch(context.to(self.threshold.dtype)).flatten(2) for branch in (self.key, self.value))
            attention = ((k.mT @ q.to(k.dtype)) * k.shape[1] ** -0.5).softmax(1)
            y = (v @ attention).to(x.dtype)
        report(self, attention=lambda: attention.to(x.dtype).unflatten(2, x.shape[2:]))
        y = self.out1(y.unflatten(2, x.shape[2:]))
        features = self.out3(self.out2(torch.cat([x, y], 1)))
        return features, self.logits(features)

    def _contexts(self, x: Tensor, saliency: Tensor, laplacian: Tensor | None) -> Tensor:
        """(B, dim, contexts), in float32 at least: sums over all positions, which half precision does not hold."""
        p = to_size(saliency, x.shape[2:]).sigmoid() - self.threshold.to(x.dtype)
        maps = [p.clamp(0, 1), (-p).clamp(0, 1), self.threshold.to(x.dtype) - p.abs()]
        if laplacian is not None and self.laplacian_threshold is not None:
            p = to_size(laplacian, x.shape[2:]).sigmoid() - self.laplacian_threshold.to(x.dtype)
            maps += [p.clamp(0, 1), (-p).clamp(0, 1)]
        weights, values = (to_size(y, self.size).flatten(2) for y in (torch.cat(maps, 1), x))
        positions = values.mT if self.reshapes == "meant" else values.reshape(x.shape[0], values.shape[2], self.dim)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            return (weights.to(wide) @ positions.to(wide)).mT

    def extra_repr(self) -> str:
        return f"dim={self.dim}, size={self.size}, reshapes={self.reshapes!r}"


def check_reshapes(reshapes: str) -> None:
    if reshapes not in Reshapes.__args__:
        raise ValueError(f"reshapes must be as_trained or meant, got {reshapes!r}")


def check_map(name: str, x: Tensor, dim: int) -> None:
    if x.ndim != 4 or x.shape[1] != dim:
        raise ValueError(f"{name} must be (B, {dim}, H, W), got shape {tuple(x.shape)}")
