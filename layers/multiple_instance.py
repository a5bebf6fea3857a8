"""Multiple-instance heads: one answer for a bag of instances, by attention (ABMIL, arXiv 1802.04712; ACMIL, arXiv 2311.07125)."""
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module

KINDS = ("gated", "multi_head")
MASKED = -1e9  # the logit of a masked instance, the authors'
AUTHORS_NAMES = {  # regular expressions of theirs, and ours
    r"^dimreduction\.fc1\.": "proj.", r"^attention\.attention_([VU])\.0\.": lambda m: f"attention.{m[1].lower()}.",
    r"^attention\.attention_weights\.": "attention.weights.", r"^classifier\.(\d+)\.fc\.": r"branches.\1.",
    r"^(Slide_classifier|classifier)\.fc\.": "classifier.", r"^q$": "queries", r"^sub_attention\.": "attention.",
    r"layer_norm\.": "norm.",
}


class BagOutput(NamedTuple):
    """What is said of bags.

    logits (B, classes) are the answer; branch_logits (B, K, classes) those of the branches, none (K = 0) where there is one branch.
    attention, (…, K, N) over all bags' instances in a row, sums to 1 over every bag; of several heads (heads, K, N). `scores` are its
    logits, before anything is masked. `sizes` are the numbers of instances of the bags.
    """

    logits: Tensor
    branch_logits: Tensor
    attention: Tensor
    scores: Tensor
    sizes: list[int]


@notrace_module
class MultipleInstanceHead(nn.Module):
    """One answer for a bag of instances, such as patches of a slide, of which some speak for the class, by K branches of attention.

        h = relu(W x);  "gated": a_k = softmax_n(w_kᵀ (tanh(V h_n) ⊙ σ(U h_n)));  branch k: linear_k(Σ_n a_kn h_n)
        the bag: linear(Σ_n mean_k(a_kn) h_n)

    "multi_head": a learned query per branch, an attention of `num_heads` heads each with projections of its own, LayerNorm on the result;
    the bag's weights are the mean over branches, head by head. K = 1 of "gated" without masking is ABMIL, with one linear layer.

    In training, of the `masked` instances of largest logits of every branch and bag, a random share `mask_drop` gets no attention
    (stochastic top-K instance masking), so that attention spreads. It is for bags of hundreds: where `masked` is near the size of a
    bag, what decides is masked more often than not, and a warning says so.

    Shapes: features of one bag, (N, D); of several, a list of them, or all in a row with `offsets` (B), where each begins; to `BagOutput`.
    Any floating dtype. `zoo.capture` gets the `attention`.

    Args:
        in_features: D.
        num_classes: classes.
        hidden: width of h; default D / 2. "multi_head" needs a multiple of num_heads.
        num_branches: K.
        kind: "gated" or "multi_head".
        attention_dim: width of V and U.
        num_heads, dropout: of "multi_head".
        masked: how many instances, at most, of which some are masked in training; 0: none.
        mask_drop: the share of them that is; authors say since that 0 is sometimes better.
        device, dtype: as in torch.

    Authors' state dicts (dazhangyu123/ACMIL, architecture/transformer.py: ABMIL, ACMIL_GA, ACMIL_MHA) load by their names. Differences from
    their code: several bags at once; attention is given after softmax, theirs before.

    Raises:
        ValueError: at construction, arguments outside what is said above; in `forward`, features that do not fit, an empty bag, offsets
            that do not begin bags.
    """

    def __init__(
        self, in_features: int, num_classes: int, hidden: int | None = None, num_branches: int = 5, kind: str = "gated",
        attention_dim: int = 128, num_heads: int = 8, dropout: float = 0.1, masked: int = 10, mask_drop: float = 0.6,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden = in_features // 2 if hidden is None else hidden
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        for name, value in dict(in_features=in_features, num_classes=num_classes, hidden=hidden, num_branches=num_branches).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if kind == "multi_head" and hidden % num_heads:
            raise ValueError(f"num_heads must divide hidden ({hidden}), got {num_heads}")
        if masked < 0 or not 0 <= mask_drop < 1:
            raise ValueError(f"masked must be at least 0 and mask_drop in [0, 1), got {masked} and {mask_drop}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_features, self.kind, self.num_branches, self.masked, self.mask_drop = in_features, kind, num_branches, masked, mask_drop
        self.proj = nn.Linear(in_features, hidden, bias=False, **dd)
        if kind == "gated":
            self.attention = _GatedScores(hidden, attention_dim, num_branches, **dd)
        else:
            self.queries = nn.Parameter(torch.empty(1, num_branches, hidden, **dd))
            self.attention = nn.ModuleList(_QueryAttention(hidden, num_heads, dropout, True, **dd) for _ in range(num_branches))
            self.bag_attention = _QueryAttention(hidden, num_heads, dropout, False, **dd)
        self.branches = nn.ModuleList(nn.Linear(hidden, num_classes, **dd) for _ in range(num_branches if num_branches > 1 else 0))
        self.classifier = nn.Linear(hidden, num_classes, **dd)
        self.reset_parameters()
        self._register_load_state_dict_pre_hook(_take_authors_names)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.kind == "multi_head":
            nn.init.normal_(self.queries, std=1e-6)

    def forward(self, features: Tensor | Sequence[Tensor], offsets: Tensor | None = None) -> BagOutput:
        x, sizes = self._rows(features, offsets)
        h = self.proj(x).relu()
        if isinstance(self.attention, _GatedScores):
            scores = self.attention(h)
            attention = _softmax(self._masked(scores, sizes), sizes)
            pooled = _sums(attention, h, sizes)  # (K, B, hidden)
            whole = pooled.mean(0)
        else:
            attends = cast(Sequence[_QueryAttention], self.attention)
            scores = torch.stack([attend.scores(query, h) for attend, query in zip(attends, self.queries[0], strict=True)], 1)
            attention = _softmax(self._masked(scores, sizes), sizes)
            pooled = torch.stack([attend.pool(attention[:, k], h, sizes) for k, attend in enumerate(attends)])
            whole = self.bag_attention.pool(attention.mean(1), h, sizes)
        report(self, attention=attention)
        branch_logits = [branch(one) for branch, one in zip(self.branches, pooled, strict=False)]
        logits = self.classifier(whole)
        of_branches = torch.stack(branch_logits, 1) if branch_logits else logits.new_empty(len(sizes), 0, logits.shape[1])
        return BagOutput(logits, of_branches, attention, scores, sizes)

    def _rows(self, features: Tensor | Sequence[Tensor], offsets: Tensor | None) -> tuple[Tensor, list[int]]:
        bags = [features] if isinstance(features, Tensor) else list(features)
        if not bags:
            raise ValueError("MultipleInstanceHead: features must be of at least one bag, got none")
        for bag in bags:
            if bag.ndim != 2 or bag.shape[1] != self.in_features:
                raise ValueError(f"MultipleInstanceHead: features must be (N, {self.in_features}), or a list of such, "
                                 f"got shape {tuple(bag.shape)}")
        if offsets is None:
            sizes = [bag.shape[0] for bag in bags]  # of exported graphs symbols
        elif not isinstance(features, Tensor) or offsets.ndim != 1 or not len(offsets) or int(offsets[0]) != 0:
            raise ValueError("MultipleInstanceHead: offsets must be (B), the first 0, and go with features in a row, (N, D)")
        else:
            sizes = torch.diff(offsets.cpu(), append=torch.tensor([len(features)])).tolist()
        if min(sizes) < 1:
            raise ValueError(f"MultipleInstanceHead: every bag must hold an instance, got bags of {sizes}")
        return bags[0] if len(bags) == 1 else torch.cat(bags), sizes

    def _masked(self, scores: Tensor, sizes: list[int]) -> Tensor:
        """In training: a random share of the largest of every row and bag, masked."""
        if not self.training or not self.masked:
            return scores
        pieces = []
        for piece in scores.split(sizes, -1):
            count = min(self.masked, piece.shape[-1])
            gone = int(count * self.mask_drop)
            if gone and 2 * gone > piece.shape[-1]:
                warnings.warn(f"MultipleInstanceHead masks {gone} of the {piece.shape[-1]} instances of a bag in training: what decides is "
                              "masked more often than not; give a smaller `masked` or `mask_drop`", stacklevel=3)
            largest = piece.topk(count, -1).indices
            chosen = torch.rand(largest.shape, device=piece.device).argsort(-1)[..., :gone]
            pieces.append(piece.scatter(-1, largest.gather(-1, chosen), MASKED))
        return torch.cat(pieces, -1)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, num_branches={self.num_branches}, masked={self.masked}, mask_drop={self.mask_drop}"


def _softmax(scores: Tensor, sizes: list[int]) -> Tensor:
    """Over the instances of every bag."""
    if len(sizes) == 1:
        return scores.softmax(-1)
    return torch.cat([piece.softmax(-1) for piece in scores.split(sizes, -1)], -1)


def _sums(weights: Tensor, x: Tensor, sizes: list[int]) -> Tensor:
    """Σ_n weights[…, n] x[…, n, :] of every bag: (…, B, channels)."""
    if len(sizes) == 1:
        return weights[..., None, :] @ x
    pairs = zip(weights.split(sizes, -1), x.split(sizes, -2), strict=True)
    return torch.cat([share[..., None, :] @ part for share, part in pairs], -2)


class _GatedScores(nn.Module):
    """w_kᵀ (tanh(V h) ⊙ σ(U h)): (N, hidden) → (K, N)."""

    def __init__(self, hidden: int, width: int, branches: int, **dd: Any):
        super().__init__()
        self.v, self.u, self.weights = nn.Linear(hidden, width, **dd), nn.Linear(hidden, width, **dd), nn.Linear(width, branches, **dd)

    def forward(self, h: Tensor) -> Tensor:
        return self.weights(self.v(h).tanh() * self.u(h).sigmoid()).mT


class _QueryAttention(nn.Module):
    """Attention of one query to the instances of a bag; without `scored` it only pools with weights that it is given."""

    def __init__(self, hidden: int, num_heads: int, dropout: float, scored: bool, **dd: Any):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = (nn.Linear(hidden, hidden, **dd) if scored else None for _ in range(2))
        self.v_proj, self.out_proj = (nn.Linear(hidden, hidden, **dd) for _ in range(2))
        self.norm = nn.LayerNorm(hidden, 1e-6, **dd)
        self.dropout = nn.Dropout(dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).movedim(-2, 0)

    def scores(self, query: Tensor, h: Tensor) -> Tensor:
        """(heads, N)."""
        assert self.q_proj is not None and self.k_proj is not None
        q, k = self._heads(self.q_proj(query)), self._heads(self.k_proj(h))
        return (k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5

    def pool(self, weights: Tensor, h: Tensor, sizes: list[int]) -> Tensor:
        """Weights (heads, N) to (B, hidden)."""
        pooled = _sums(weights, self._heads(self.v_proj(h)), sizes)
        return self.norm(self.dropout(self.out_proj(pooled.movedim(0, -2).flatten(-2))))


def _take_authors_names(state: dict[str, Any], prefix: str, *_: Any) -> None:
    given = [name for name in state if name.startswith(prefix)]
    if not any(name.startswith(f"{prefix}dimreduction.") for name in given):
        return
    for name in given:
        ours = name[len(prefix):]
        for theirs, new in AUTHORS_NAMES.items():
            ours = re.sub(theirs, new, ours)
        state[prefix + ours] = state.pop(name)
