"""The two attentions of HAN, the holistic attention network (arXiv 2008.08767): between layers, and over channels and positions at once."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels._backends import autocasting

from ._capture import report
from ._tracing import notrace_module


@notrace_module
class LayerAttention(nn.Module):
    """Attention between the features of N layers, each as one long vector (HAN's layer attention module, section 3.2).

    With V the layers' features as (N, C·H·W) and a learned γ that starts at 0:

        A = softmax(−V Vᵀ)          (N, N), over the last axis, unscaled
        out = γ A V + V

    (B, N, C, H, W) → (B, N, C, H, W), any sizes, any floating dtype. `zoo.capture` gets the `attention` A, (B, N, N).

    The logits are sums over C·H·W products, which float16 cannot hold and which bfloat16 rounds by more than they differ: A and what it
    mixes are computed in float32 whatever the input's dtype, under autocast too. At the sizes of photographs A chooses one layer, the
    one least like the query; its choice depends on how large the picture is.

    Args:
        device, dtype: as in timm. There is no width: γ is the only parameter.

    Difference from the authors' code (wwlCape/HAN, src/model/han.py: LAM_Module): the output keeps its axis of layers, where theirs is
    (B, N·C, H, W), as after `flatten(1, 2)`. They write max(V Vᵀ) − V Vᵀ, which is the same to a softmax.

    Raises:
        ValueError: an input of other dimensions, in `forward`.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5:
            raise ValueError(f"LayerAttention: x must be (B, layers, C, H, W), got shape {tuple(x.shape)}")
        if autocasting(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._attend(x)
        return self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        v = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        attention = (-(v @ v.transpose(1, 2))).softmax(-1)
        report(self, attention=attention)
        out = self.gamma.to(v.dtype) * (attention @ v) + v
        return out.to(x.dtype).unflatten(2, x.shape[2:])


@notrace_module
class ChannelSpatialAttention(nn.Module):
    """A gate for every number of a map, of its neighbours in height, width and channels (HAN's channel-spatial attention, section 3.3).

    With a 3×3×3 convolution of one channel over (C, H, W), zero padded, with bias, and a learned γ that starts at 0:

        out = X + γ X ⊙ sigmoid(conv(X))

    (B, dim, H, W) → (B, dim, H, W), any sizes, any floating dtype; at the start the output is the input. `zoo.capture` gets the `gate`,
    (B, C, H, W). The order of the channels counts: neighbours share a gate's convolution.

    Args:
        dim: C, which nothing here depends on; for the form that `zoo.attach` and timm have.
        device, dtype: as in timm.

    Difference from the authors' code (wwlCape/HAN, src/model/han.py: CSAM_Module): none in what is computed. The convolution is one in
    two dimensions of every channel beside its neighbours, several times faster on a CPU, and `channels_last` holds for its weights,
    (1, 3, 3, 3), where theirs are (1, 1, 3, 3, 3).

    Raises:
        ValueError: an input of other dimensions, in `forward`.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim = dim
        self.conv = nn.Conv2d(3, 1, 3, padding=1, **dd)  # of each channel and its two neighbours
        self.gamma = nn.Parameter(torch.empty(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def gate(self, x: Tensor) -> Tensor:
        """(B, C, H, W), in (0, 1)."""
        around = F.pad(x, (0, 0, 0, 0, 1, 1))
        triples = torch.stack([around[:, :-2], x, around[:, 2:]], 2).flatten(0, 1)
        return self.conv(triples).unflatten(0, x.shape[:2]).squeeze(2).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"ChannelSpatialAttention: x must be (B, C, H, W), got shape {tuple(x.shape)}")
        gate = self.gate(x)
        report(self, gate=gate)
        return x + self.gamma * (x * gate)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
