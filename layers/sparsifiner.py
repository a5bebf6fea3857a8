"""Sparsifiner, attention of every query to the few keys that a small network picks for it (arXiv 2303.13755)."""
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, trunc_normal_, use_fused_attn
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zoo.kernels._backends import in_forward_mode
from zoo.kernels._exporting import is_exporting

from ._capture import report
from ._tracing import notrace_module


class Grid:
    """A hook of a model's patch embedding: keeps the height and width of the map of patches that the model is at work on."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None

    def __call__(self, patch_embed: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        height, width = patch_embed.dynamic_feat_size(inputs[0].shape[-2:])
        self.size = None if isinstance(height, torch.fx.Proxy) else (height, width)

    def __reduce__(self) -> tuple[type["Grid"], tuple[()]]:  # copies begin anew, and sizes of exported graphs are in no file
        return Grid, ()


@notrace_module
class SparsifinerAttention(nn.Module):
    """softmax(scale · Q Kᵀ + bias) V over the keys in a mask, which is predicted for every query and head.

    (B, heads, N, d) three times → (B, heads, N, d), N tokens: prefix tokens, then a map of patches, row by row. In the place of softmax by
    `zoo.replace_attention(vit, "sparsifiner")`. The predictor, whose weights the heads share, with narrow q' = W_q q + b_q and
    k' = W_k k + b_k, and R vectors over positions P and U, both (N, R):

        coefficients C = top(softmax(q' (k'ᵀ P) / √heads))      (N, R), of which so many are left for every query
        approximation  C |U|ᵀ, |U| = 0 up to `basis_threshold`   (N, N), sparse by sparse
        mask           the ⌈keep · N⌉ largest of every row; of equal ones, those of the first keys

    Prefix tokens attend to all keys. No gradient passes the mask, so that only `zoo.SparsifinerReconstructionLoss` trains the predictor:
    there C keeps all its entries and U its signs. A query without any key, as a `threshold` may leave one, puts out 0.

    P and U are for patches of `grid_size`. Maps of other sizes, which `zoo.replace_attention` lets the mechanism know of, interpolate them
    (bicubically, divided by how many times more patches there are, so that sums over patches stay). Keys that a bias masks (-∞) are in
    no mask, and where they are masked for all queries in no sum. The predictor computes in at least float32, under autocast too. Masks
    are dense: memory grows with N², as without fused attention, and no time is saved. `zoo.capture` gets `attention` and the boolean
    `mask`, (B, heads, N, N); `coefficients` (B, heads, N - prefix, R) and `approximation` (B, heads, N - prefix, N).

    Args:
        num_heads, head_dim: of queries, keys and values.
        grid_size: height and width of the map of patches; `zoo.replace_attention` takes them from the model.
        num_prefix_tokens: tokens before the patches, such as that of the class; from the model, too.
        keep: share of the keys in every row of the mask, in (0, 1].
        threshold: instead, the mask is where the approximation is larger than this.
        reduced_dim: width of q' and k'; default d // 2.
        num_basis: R; default N // 6.
        basis_threshold: of the absolute numbers in U, those up to this count as 0.
        keep_coefficients: how many of a query's coefficients are left.
        coefficient_threshold: instead, those that are larger than this are left.
        shared_basis: P is U.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (lim142857/Sparsifiner, src/models/sparsifiner.py): any size and any number of prefix tokens, of
    which theirs have one; ties go to the first keys, theirs to what torch.topk finds; no pruning of tokens.

    Raises:
        ValueError: at construction, a share, size or threshold out of its range; in `forward`, as many tokens as belong to no known map.
    """

    heads_are_independent = True

    def __init__(
        self, num_heads: int, head_dim: int, grid_size: tuple[int, int], num_prefix_tokens: int = 1, keep: float = 0.25,
        threshold: float | None = None, reduced_dim: int | None = None, num_basis: int | None = None, basis_threshold: float = 0.02,
        keep_coefficients: int = 8, coefficient_threshold: float | None = None, shared_basis: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        height, width = grid_size
        self.num_tokens = num_prefix_tokens + height * width
        reduced_dim = max(1, head_dim // 2) if reduced_dim is None else reduced_dim
        num_basis = max(1, self.num_tokens // 6) if num_basis is None else num_basis
        counts = dict(grid_size=min(height, width), reduced_dim=reduced_dim, num_basis=num_basis, keep_coefficients=keep_coefficients)
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {grid_size if name == 'grid_size' else count}")
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be at least 0, got {num_prefix_tokens}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep is a share of the keys, above 0 and up to 1, got {keep}")
        for name, value in dict(threshold=threshold, basis_threshold=basis_threshold, coefficient_threshold=coefficient_threshold).items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.num_heads, self.head_dim, self.grid_size, self.num_prefix_tokens = num_heads, head_dim, (height, width), num_prefix_tokens
        self.keep, self.threshold, self.basis_threshold = keep, threshold, basis_threshold
        self.keep_coefficients, self.coefficient_threshold = min(keep_coefficients, num_basis), coefficient_threshold
        self.fused_attn = use_fused_attn()
        self.grid: Grid | None = None
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.proj_c_q, self.proj_c_k = (nn.Linear(head_dim, reduced_dim, **dd) for _ in range(2))
        self.proj_n = nn.Parameter(torch.empty(self.num_tokens, num_basis, **dd))
        self.proj_back_n = self.proj_n if shared_basis else nn.Parameter(torch.empty_like(self.proj_n))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.proj_c_q.weight, self.proj_c_k.weight, self.proj_n, self.proj_back_n):
            trunc_normal_(weight, std=0.02)
        for linear in (self.proj_c_q, self.proj_c_k):
            nn.init.zeros_(linear.bias)

    @classmethod
    def for_model(cls, model: nn.Module, **args: Any) -> Callable[..., nn.Module]:
        """The class with the arguments that `model` knows, unless they are in `args`."""
        if "grid_size" in args:
            return partial(cls, **args)
        found = _embedded(model)
        if found is None:
            raise ValueError(f"{type(model).__name__} has no patch_embed that tells its map of patches: grid_size has to be given")
        return partial(cls, **{"grid_size": found.patch_embed.grid_size, "num_prefix_tokens": found.num_prefix_tokens, **args})

    def join(self, model: nn.Module) -> None:
        """From now on sizes are those of the maps of patches that `model` is at work on, if `for_model` took them from it."""
        found = _embedded(model)
        if found is None or self.grid_size != tuple(found.patch_embed.grid_size):
            return
        hooks = found.patch_embed._forward_hooks.values()
        self.grid = next((hook for hook in hooks if isinstance(hook, Grid)), None)
        if self.grid is None:
            self.grid = Grid()
            found.patch_embed.register_forward_hook(self.grid)

    def keep_heads(self, heads: list[int]) -> None:
        """Nothing here is one head's, and √heads stays that of all of them, with which the predictor has learned."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None, dropout: float = 0.0,
    ) -> Tensor:
        """`bias` broadcasts to (B, heads, N, N), `scale` is d^-0.5 by default, `dropout` the share of weights that is left out."""
        scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
        mask = self.mask(q, k, bias)
        if self.fused_attn and not is_exporting() and not in_forward_mode():
            report(self, attention=lambda: self._attention(q, k, bias, scale, mask))
            seen = mask if bias is None else bias.to(q.dtype).masked_fill(~mask, -torch.inf)
            return F.scaled_dot_product_attention(q, k, v, seen, dropout, scale=scale)
        attention = self._attention(q, k, bias, scale, mask)
        report(self, attention=attention)
        return F.dropout(attention, dropout) @ v if dropout else attention @ v

    def _attention(self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float, mask: Tensor | None) -> Tensor:
        z = (q * scale) @ k.transpose(-2, -1)
        z = z if bias is None else z + bias.to(z.dtype)
        if mask is None:
            return z.softmax(-1)
        return z.masked_fill(~mask, torch.finfo(z.dtype).min).softmax(-1).masked_fill(~mask, 0)

    def mask(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """Which keys each query attends to, (B, heads, N, N), boolean."""
        tokens, prefix = q.shape[-2], self.num_prefix_tokens
        hidden = _hidden(bias, tokens)
        coefficients, approximation = self._approximated(q, k, hidden, sparse=True)
        score = approximation.detach()
        if hidden is not None:
            score = score.masked_fill(hidden[..., prefix:, :], -torch.inf)
        chosen = _largest(score, math.ceil(self.keep * tokens)) if self.threshold is None else ~(score <= self.threshold)
        mask = torch.cat([chosen.new_ones(()).expand(*chosen.shape[:-2], prefix, tokens), chosen], -2)
        mask = mask if hidden is None else mask & ~hidden
        report(self, mask=mask, coefficients=coefficients, approximation=approximation)
        return mask

    def reconstruction_error(self, q: Tensor, k: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
        """The sum of all (C Uᵀ - A)², a scalar: all coefficients and signs in C Uᵀ, and A the attention of all keys, without gradient."""
        scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
        coefficients, approximation = self._approximated(q, k, _hidden(bias, q.shape[-2]), sparse=False)
        with torch.no_grad():
            attention = self._attention(q, k, bias, scale, None)
        report(self, attention=attention, coefficients=coefficients, approximation=approximation)
        return (approximation - attention[..., self.num_prefix_tokens :, :]).square().sum()

    def _approximated(self, q: Tensor, k: Tensor, hidden: Tensor | None, sparse: bool) -> tuple[Tensor, Tensor]:
        """C and C Uᵀ."""
        with torch.autocast(q.device.type, enabled=False):
            dtype = torch.promote_types(q.dtype, torch.float32)
            narrow_q, narrow_k = (
                F.linear(y.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype))
                for y, linear in ((q[..., self.num_prefix_tokens :, :], self.proj_c_q), (k, self.proj_c_k)))
            if hidden is not None:
                narrow_k = narrow_k.masked_fill(hidden.all(-2)[..., None], 0)
            basis = self.proj_back_n.to(dtype)
            if sparse:
                basis = F.threshold(basis.abs(), self.basis_threshold, 0)
            into, back = (self._resized(y, q.shape[-2]) for y in (self.proj_n.to(dtype), basis))
            coefficients = (narrow_q @ (narrow_k.mT @ into) * self.num_heads**-0.5).softmax(-1)
            if sparse and self.coefficient_threshold is None:
                coefficients = coefficients * _largest(coefficients.detach(), self.keep_coefficients)
            elif sparse:
                coefficients = F.threshold(coefficients, self.coefficient_threshold or 0, 0)
            return coefficients, coefficients @ back.mT

    def _resized(self, basis: Tensor, tokens: int) -> Tensor:
        """P or U for the map of patches that so many tokens are of."""
        size, own = self._size(tokens), self.grid_size
        if all(statically_known_true(now == then) for now, then in zip(size, own, strict=True)):
            return basis
        resized = resample_abs_pos_embed(basis[None], list(size), list(own), self.num_prefix_tokens)[0]
        prefix, patches = resized[: self.num_prefix_tokens], resized[self.num_prefix_tokens :]
        return torch.cat([prefix, patches * (own[0] * own[1] / (size[0] * size[1]))])

    def _size(self, tokens: int) -> tuple[int, int]:
        present = None if self.grid is None else self.grid.size
        if is_exporting():
            return present or self.grid_size
        for size in (present, self.grid_size):
            if size is not None and self.num_prefix_tokens + size[0] * size[1] == tokens:
                return size
        height, width = present or self.grid_size
        raise ValueError(f"{tokens} tokens are not {self.num_prefix_tokens} and a map of {height}×{width} patches, for which the "
                         "SparsifinerAttention is")

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, keep={self.keep}" if self.threshold is None else f"threshold={self.threshold}"


def _embedded(model: nn.Module) -> Any:
    """The part of `model` that embeds patches and knows of tokens before them."""
    return next((module for module in model.modules() if isinstance(getattr(module, "num_prefix_tokens", None), int)
                 and hasattr(getattr(module, "patch_embed", None), "dynamic_feat_size")
                 and getattr(module.patch_embed, "grid_size", None) is not None), None)


def _hidden(bias: Tensor | None, tokens: int) -> Tensor | None:
    """Where a bias masks keys: -∞, or the least number in its place; (…, N, N)."""
    if bias is None:
        return None
    hidden = torch.atleast_2d(bias <= torch.finfo(bias.dtype).min / 2)
    return hidden.expand(*hidden.shape[:-2], tokens, tokens)


def _largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest numbers of each row are; of equal ones, the first."""
    least = x.topk(count, -1).values[..., -1:]  # indices of equal numbers are not defined, numbers are
    above, equal = x > least, (x == least) | least.isnan()  # rows of NaN stay no answer, as in softmax
    return above | equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True))
