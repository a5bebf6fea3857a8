"""Efficient probing, EP (arXiv 2506.10178)."""
from typing import Any

import torch
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module


@notrace_module
class EfficientProbing(nn.Module):
    """Pools tokens by learned queries, each of which gathers its own share of the channels (arXiv 2506.10178).

        a_i = softmax_n(q_i · x_n / √C),  out = concat_i(V_i Σ_n a_in x_n)

    V (C / d_out, C) has no bias, and V_i is its i-th chunk of C / (d_out · Q) rows; there are no keys beside the tokens.
    (B, N, C) → (B, C / d_out), any number of tokens, any floating dtype. `zoo.capture` gets the `attention` a, (B, Q, N).

    Args:
        dim: C.
        num_queries: Q, which has to divide C / d_out.
        d_out: what the width is divided by.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (billpsomas/efficient-probing, poolings/ep.py): tokens are pooled before V, not after it, which
    gives the same numbers for 1 / N of the products with V. The projected keys, plain values and averaged queries of their README are
    not in their code, which made the published numbers, and not here.

    Raises:
        ValueError: arguments outside what is said above, at construction; tokens of another shape, in `forward`.
    """

    def __init__(
        self, dim: int, num_queries: int = 32, d_out: int = 1, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(dim, num_queries, d_out) < 1:
            raise ValueError(f"dim, num_queries and d_out must be at least 1, got {dim}, {num_queries} and {d_out}")
        if dim % (d_out * num_queries):
            raise ValueError(f"num_queries must divide dim / d_out into whole chunks, got {num_queries} for {dim} / {d_out}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim, self.num_queries, self.out_features = dim, num_queries, dim // d_out
        self.cls_token = nn.Parameter(torch.empty(1, num_queries, dim, **dd))  # the queries, by the authors' name
        self.v = nn.Linear(dim, self.out_features, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        self.v.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("EfficientProbing", x, self.dim)
        attention = (self.cls_token * self.dim**-0.5 @ x.mT).softmax(-1)
        report(self, attention=attention)
        pooled = attention.to(x.dtype) @ x
        chunks = self.v.weight.unflatten(0, (self.num_queries, -1))
        return (pooled.transpose(0, 1) @ chunks.mT).transpose(0, 1).flatten(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_queries={self.num_queries}, out_features={self.out_features}"


def check_tokens(layer: str, x: Tensor, dim: int) -> None:
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"{layer}: x must be (B, N, {dim}), got shape {tuple(x.shape)}")
