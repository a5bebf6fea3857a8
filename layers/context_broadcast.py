"""Context broadcasting, CB (arXiv 2210.08457)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module


@notrace_module
class ContextBroadcast(nn.Module):
    """Adds the mean of all tokens to every token, at the end of a vision transformer's MLPs (arXiv 2210.08457).

        CB: out = (x + mean(x)) / 2,  CB_S: out = x + λ ⊙ mean(x)

    (B, …, C) → (B, …, C), tokens being all dimensions between batch and channels; any floating dtype. `zoo.capture` gets the
    `similarity` (B, …), the cosine of every token and the mean.

    Args:
        dim: C.
        scaled: CB_S, with a learned λ per channel that starts at 0, so that a trained network's outputs are at first what
            they were. CB has no parameters.
        device, dtype: of the parameters, as in torch.

    Raises:
        ValueError: a width below 1, at construction; tokens of another width, or none, in `forward`.
    """

    def __init__(
        self, dim: int, scaled: bool = False, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.scale = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if scaled else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.scale is not None:
            nn.init.zeros_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[-1] != self.dim:
            raise ValueError(f"ContextBroadcast: x must be (B, …, {self.dim}), got shape {tuple(x.shape)}")
        mean = x.mean(tuple(range(1, x.ndim - 1)), keepdim=True)
        report(self, similarity=lambda: F.cosine_similarity(x, mean, -1))
        return (x + mean) / 2 if self.scale is None else x + self.scale * mean

    def extra_repr(self) -> str:
        return f"dim={self.dim}, scaled={self.scale is not None}"
