"""Dual attention beside plain attention, and beside relations of all pairs: a layer, at several numbers of tokens.

    python -m benchmarks.dual_attention > benchmarks/dual_attention.md
"""
import time

import torch
from timm.layers import Attention
from torch import Tensor, nn

from zoo.layers import DualAttention, RelationalAttention
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts

DIM, HEADS, SIDES = 384, 6, (14, 28)  # of ViT-S at 224 and 448 pixels; half of the heads are relational
HEAD = """# Dual attention

`python -m benchmarks.dual_attention`: one layer of width {dim} with {heads} heads, of which three are relational with three relations;
symbols are given. *plain attention*: the rival is timm's `Attention`, fused, of as many heads. *pairs*: the rival is dual attention that
makes the relations of all pairs, (N, N, R) numbers, as the definition has them.

{table}

Dual attention takes about twice the time of plain attention or more: either kind of heads has its own projections, and relational heads
also attend with keys of relations, as wide as all heads together. Without relations of all pairs it is as fast as with them at three
relations, and training keeps less; forward, a CPU's attention of values wider than queries is not fused and makes its matrix.
The machine was not quiet.
"""


class Pairs(RelationalAttention):
    """The relations of all pairs are made, whatever the activation."""

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        attention = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        return attention @ v, torch.einsum("bhij,brij->bhir", attention, of_q @ of_k.mT)


class WithSymbols(nn.Module):
    """A dual layer of one input: tokens, and symbols behind them."""

    def __init__(self, layer: DualAttention):
        super().__init__()
        self.layer = layer

    def forward(self, both: Tensor) -> Tensor:
        return self.layer(*both.chunk(2, -1))


class Plain(Attention):
    def forward(self, both: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return super().forward(both.chunk(2, -1)[0])


def layers(batch: int, rounds: int) -> Report:
    torch.set_num_threads(2)
    comparisons = []
    for side in SIDES:
        both = torch.randn(batch, side**2 + 1, 2 * DIM, generator=torch.Generator().manual_seed(0))
        ours, pairs = (WithSymbols(DualAttention(DIM, HEADS // 2, HEADS // 2)) for _ in range(2))
        pairs.layer.relational_attention = Pairs(DIM, HEADS // 2, total_heads=HEADS)
        pairs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(pairs(both), ours(both), atol=1e-4, rtol=1e-4)
        for rival, name in ((Plain(DIM, HEADS, proj_bias=False), "plain attention"), (pairs, "pairs")):
            for kind in PASSES:
                comparisons.append(compare(f"{name}, {side**2 + 1} tokens", kind, ours, rival, both, rounds, time.perf_counter))
    return Report(facts(batch, {"tokens": ", ".join(str(side**2 + 1) for side in SIDES)}, "float32", rounds, "cpu", True), comparisons)


if __name__ == "__main__":
    print(HEAD.format(dim=DIM, heads=HEADS, table=layers(batch=1, rounds=5).markdown()))
