"""Attention gates of U-Nets (Attention U-Net, arXiv 1804.03999)."""
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels._exporting import is_exporting

from ._capture import report
from ._initialization import fan_in_normal_
from ._spatial import CONV, SIZES, Norm, check_spatial, crop, norm_layer, pad_to_multiple, resize
from ._tracing import notrace_module

Normalization = Literal["sigmoid", "softmax"]


@notrace_module
class AttentionGate(nn.Module):
    """Lets through what a coarser map, the gating signal, finds relevant in a skip connection (arXiv 1804.03999, section 2.1).

    With the skip x and the gating signal g, linear interpolation ↑, and position by position:

        a = ↑σ(ψ(ReLU(θ(x) + ↑φ(g)))),  out = norm(proj(a ⊙ x))

    θ is a 2×2(×2) convolution of stride 2 without bias, φ, ψ and proj are 1×1(×1). σ is the sigmoid, or the softmax over all
    positions (the residual form of the authors' code).

    x (B, dim, H, W) and g (B, gate_dim, h, w) → (B, dim, H, W); with three spatial dimensions (B, dim, D, H, W) and so on. Any
    sizes, any floating dtype. `zoo.capture` gets `attention`: a, (B, 1, H, W), between 0 and 1.

    Args:
        dim, gate_dim: channels of x and of g.
        hidden_dim: channels of θ(x) and φ(g); default `dim`.
        spatial_dims: 2 or 3.
        normalization: "sigmoid" or "softmax".
        norm: "batch", "instance", or "group" (8 channels each).
        device, dtype: as in torch.

    Differences from the authors' code (ozan-oktay/Attention-Gated-Networks, models/layers/grid_attention_layer.py: GridAttentionBlock,
    modes concatenation and concatenation_residual): where a size is odd, θ sees the last slice twice, which theirs leaves out.

    Raises:
        ValueError: arguments outside what is said above, at construction; maps of other shapes, in `forward`.
    """

    def __init__(
        self,
        dim: int,
        gate_dim: int,
        hidden_dim: int | None = None,
        spatial_dims: int = 2,
        normalization: Normalization = "sigmoid",
        norm: Norm = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_spatial(spatial_dims, norm)
        if normalization not in Normalization.__args__:
            raise ValueError(f"normalization must be sigmoid or softmax, got {normalization!r}")
        hidden_dim = dim if hidden_dim is None else hidden_dim
        for name, width in dict(dim=dim, gate_dim=gate_dim, hidden_dim=hidden_dim).items():
            if width < 1:
                raise ValueError(f"{name} must be at least 1, got {width}")
        self.dim, self.gate_dim, self.spatial_dims, self.normalization = dim, gate_dim, spatial_dims, normalization
        conv = CONV[spatial_dims]
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.theta = conv(dim, hidden_dim, 2, stride=2, bias=False, **dd)
        self.phi = conv(gate_dim, hidden_dim, 1, **dd)
        self.psi = conv(hidden_dim, 1, 1, **dd)
        self.proj = conv(dim, dim, 1, **dd)
        self.norm = norm_layer(norm, spatial_dims, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_in_normal_(self.children())

    def attention(self, x: Tensor, g: Tensor) -> Tensor:
        """a, one number for every position of x."""
        halves = [(n + 1) // 2 for n in x.shape[2:]]
        scores = self.psi(F.relu(self.theta(self._padded(x)) + resize(self.phi(g), halves)))
        weights = scores.sigmoid() if self.normalization == "sigmoid" else scores.flatten(1).softmax(-1).view_as(scores)
        return crop(resize(weights, 2), x.shape[2:]).to(x.dtype)

    def _padded(self, x: Tensor) -> Tensor:
        if is_exporting():  # where a size is even, stride 2 leaves a further slice alone, and a graph need not ask
            return F.pad(x, (0, 1) * self.spatial_dims, mode="replicate")
        return pad_to_multiple(x, 2, "replicate")

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        self._check("x", x, self.dim)
        self._check("g", g, self.gate_dim)
        attention = self.attention(x, g)
        report(self, attention=attention)
        return self.norm(self.proj(attention * x))

    def _check(self, name: str, x: Tensor, dim: int) -> None:
        if x.ndim != 2 + self.spatial_dims or x.shape[1] != dim:
            raise ValueError(f"AttentionGate: {name} must be (B, {dim}, {SIZES[self.spatial_dims]}), got shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, gate_dim={self.gate_dim}, spatial_dims={self.spatial_dims}, normalization={self.normalization}"


@notrace_module
class MultiAttentionGate(nn.Module):
    """Several attention gates of one skip connection, combined: ReLU(norm(combine(concatenated outputs))).

    `combine` is 1×1(×1). Shapes and arguments as in `AttentionGate`; every gate reports its own `attention`. It is the
    authors' MultiAttentionBlock, with two gates in their network for CT (models/networks/unet_CT_multi_att_dsv_3D.py).

    Args:
        num_gates: how many, at least 1.
    """

    def __init__(
        self,
        dim: int,
        gate_dim: int,
        hidden_dim: int | None = None,
        spatial_dims: int = 2,
        num_gates: int = 2,
        normalization: Normalization = "sigmoid",
        norm: Norm = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_gates < 1:
            raise ValueError(f"num_gates must be at least 1, got {num_gates}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.gates = nn.ModuleList(
            AttentionGate(dim, gate_dim, hidden_dim, spatial_dims, normalization, norm, **dd) for _ in range(num_gates))
        self.combine = CONV[spatial_dims](num_gates * dim, dim, 1, **dd)
        self.norm = norm_layer(norm, spatial_dims, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_in_normal_((self.combine, self.norm))

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return F.relu(self.norm(self.combine(torch.cat([gate(x, g) for gate in self.gates], 1))))
