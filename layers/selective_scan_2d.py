"""Selective scans of maps in four orders: SS2D (VMamba, arXiv 2401.10166), and with modulation (SUM, arXiv 2406.17815)."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import selective_scan

from ._capture import report
from ._linear import linear
from ._tracing import notrace_module

ORDERS = 4  # row by row, column by column, and both from the end
LEAST_STEP, STEPS = 1e-4, (1e-3, 0.1)  # δ at first: between these, drawn evenly in their logarithms
MODULATION = ("shift1", "scale1", "shift2", "scale2", "scale3")


@notrace_module
class SelectiveScan2d(nn.Module):
    """A state walks over the map in four orders, and what it keeps is decided at every position (arXiv 2401.10166, section 4.2: SS2D).

        (a, z) = in_proj(x),   u = SiLU(dwconv(a))
        u_k, k = 0 … 3: the positions of u row by row, column by column, and both of these from the last to the first
        (d, B, C) = X_k u_k,   δ = softplus(T_k d + b_k)
        h_t = exp(δ_t A) h_{t-1} + δ_t u_t B_t,   y_t = C_t · h_t + D u_t                          (`zoo.kernels.selective_scan`)
        out = out_proj(LayerNorm(y_0 + y_1 + y_2 + y_3) · SiLU(z)),  each y_k back in the places of its positions

    (B, H, W, dim) → (B, H, W, dim), any height and width, any floating dtype; the scan is computed in float32 at least. What one position
    receives from all others takes O(H W) operations and not O(H² W²). `zoo.capture` gets the `steps` δ, (B, 4, E, H, W), of each order
    where its positions are: what a state takes in, and by how much it forgets what it held.

    With modulation (arXiv 2406.17815, section 3.2), five numbers for each picture, shift₁, scale₁, shift₂, scale₂, scale₃:
    x ← x (1 + scale₁) + shift₁ at first, Σ y ← Σ y (1 + scale₃) before its LayerNorm, and · (1 + scale₂) + shift₂ after it.

    Args:
        dim: the width of x.
        state_dim: N, of the state of each channel.
        expand: E / dim, of the channels that are scanned.
        step_dim: R, the width of d; default ⌈dim / 16⌉.
        kernel_size: of the depthwise convolution, odd.
        device, dtype: of the parameters, as in torch.

    Parameters are called as the authors call them: `A_logs`, (4 E, N), with A = -exp(A_logs), and `Ds` are not for weight decay.

    Differences from the authors' code (Arhosseini77/SUM, net/models/vmamba.py: SS2D; MzeroMiko/VMamba of January 2024): no CUDA extension,
    and no dropout; in half precision the orders are added in it.

    Raises:
        ValueError: arguments outside what is said above, at construction; a map or modulation of another shape, in `forward`.
    """

    def __init__(
        self, dim: int, state_dim: int = 16, expand: int = 2, step_dim: int | None = None, kernel_size: int = 3,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        given = dict(dim=dim, state_dim=state_dim, expand=expand, step_dim=1 if step_dim is None else step_dim, kernel_size=kernel_size)
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim, self.state_dim = dim, state_dim
        inner, self.step_dim = expand * dim, math.ceil(dim / 16) if step_dim is None else step_dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(ORDERS, self.step_dim + 2 * state_dim, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(ORDERS, inner, self.step_dim, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(ORDERS, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(ORDERS * inner, state_dim, **dd))
        self.Ds = nn.Parameter(torch.empty(ORDERS * inner, **dd))
        self.out_norm = nn.LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First values of its own parameters; its modules have theirs."""
        own = self.x_proj_weight
        for weight, width in ((own, own.shape[2]), (self.dt_projs_weight, self.step_dim)):
            nn.init.uniform_(weight, -(width**-0.5), width**-0.5)
        low, high = map(math.log, STEPS)
        with torch.no_grad():
            steps = torch.empty(self.dt_projs_bias.shape, device=own.device).uniform_(low, high).exp().clamp(min=LEAST_STEP)
            self.dt_projs_bias.copy_(steps + (-torch.expm1(-steps)).log())  # of which softplus makes the steps
            self.A_logs.copy_(torch.arange(1, self.state_dim + 1, device=own.device).float().log())
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """x (B, H, W, dim); `modulation` (B, 5), or (1, 5) for all pictures: shift₁, scale₁, shift₂, scale₂, scale₃."""
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"SelectiveScan2d: x must be (B, H, W, {self.dim}), got shape {tuple(x.shape)}")
        shift1 = scale1 = shift2 = scale2 = scale3 = None
        if modulation is not None:
            if modulation.ndim != 2 or modulation.shape[1] != len(MODULATION):
                raise ValueError(f"SelectiveScan2d: modulation must be (B, {len(MODULATION)}), {', '.join(MODULATION)}, got shape "
                                 f"{tuple(modulation.shape)}")
            shift1, scale1, shift2, scale2, scale3 = modulation.to(x.dtype)[:, :, None, None, None].unbind(1)
        a, z = linear(self.in_proj, _modulated(x, scale1, shift1)).chunk(2, -1)
        y = self._scanned(F.silu(self.conv2d(a.permute(0, 3, 1, 2))))
        y = _modulated(self.out_norm(_modulated(y, scale3, None)), scale2, shift2)
        return linear(self.out_proj, y * F.silu(z))

    def _scanned(self, u: Tensor) -> Tensor:
        """(B, E, H, W) → (B, H, W, E), the sum of the four orders."""
        height, width = u.shape[2:]
        forth = torch.stack([u.flatten(2), u.mT.flatten(2)], 1)
        u = torch.cat([forth, forth.flip(-1)], 1)  # (B, 4, E, H W)
        d, b, c = (self.x_proj_weight @ u).split((self.step_dim, self.state_dim, self.state_dim), 2)
        steps = self.dt_projs_weight @ d
        report(self, steps=lambda: self._in_place(F.softplus((steps + self.dt_projs_bias[:, :, None]).float()), height, width))
        a = -self.A_logs.to(torch.promote_types(self.A_logs.dtype, torch.float32)).exp()
        y = selective_scan(u.flatten(1, 2), steps.flatten(1, 2), a, b, c, self.Ds, self.dt_projs_bias.flatten(), True)
        forth, back = y.unflatten(1, (ORDERS, -1)).chunk(2, 1)
        rows, columns = (forth + back.flip(-1)).unbind(1)
        return (rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT).permute(0, 2, 3, 1)

    @staticmethod
    def _in_place(y: Tensor, height: int, width: int) -> Tensor:
        """(B, 4, E, H W) in the four orders → (B, 4, E, H, W)."""
        forth, back = y.chunk(2, 1)
        rows, columns = torch.stack([forth, back.flip(-1)], 1).unbind(2)
        rows, columns = rows.unflatten(-1, (height, width)), columns.unflatten(-1, (width, height)).mT
        return torch.stack([rows[:, 0], columns[:, 0], rows[:, 1], columns[:, 1]], 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, state_dim={self.state_dim}, step_dim={self.step_dim}"


def _modulated(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        x = x * (1 + scale)
    return x if shift is None else x + shift
