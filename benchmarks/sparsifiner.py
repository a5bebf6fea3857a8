"""Whether attention to few keys is faster than attention to all: Sparsifiner, dense and gathered, beside torch's fused attention.

    python -m benchmarks.sparsifiner > benchmarks/sparsifiner.md
"""
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import SparsifinerAttention
from zoo.measuring.model_benchmark import FORWARD, Report, compare, facts

HEADS, WIDTH, SIDES, SHARES = 6, 64, (14, 28), (0.25, 0.05)  # DeiT-S at 224 and 448 pixels; keys that are left
HEAD = """# Attention to few keys

`python -m benchmarks.sparsifiner`: what stands between projections in a layer of DeiT-S ({heads} heads of width {width}), with the named
share of keys left for every query; the rival is torch's fused attention to all keys. *masked*: `SparsifinerAttention` as it is, dense
masks in fused attention. *gathered*: the same masks, but only the products of keys that are left, gathered for every query.
*gathered, masks for nothing*: the same without the predictor, as if the masks were known. *predictor*: the masks alone.

{table}

No side takes less than {least:.1f} times the time of attention to all keys, at any share: the masks alone cost more than the attention
that they thin out, and keys that every query picks for itself are gathered one by one, where a dense product reads each once. The counts
of operations that the paper reports as saved are no time here.
"""


class Full(nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


class Masked(nn.Module):
    def __init__(self, side: int, share: float):
        super().__init__()
        self.layer = SparsifinerAttention(HEADS, WIDTH, (side, side), keep=share)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.layer(*qkv.unbind(0))


class Predictor(Masked):
    def forward(self, qkv: Tensor) -> Tensor:
        return self.layer.mask(qkv[0], qkv[1]).to(qkv.dtype)


class Gathered(Masked):
    """The class token attends to all keys; every patch to as many as the mask leaves it, whose places are the mask's."""

    def forward(self, qkv: Tensor) -> Tensor:
        return self.attend(qkv, self.places(qkv))

    def places(self, qkv: Tensor) -> Tensor:
        mask = self.layer.mask(qkv[0], qkv[1])[..., 1:, :]
        return mask.nonzero()[:, -1].view(*mask.shape[:-1], -1)

    @staticmethod
    def attend(qkv: Tensor, places: Tensor) -> Tensor:
        q, k, v = qkv.unbind(0)
        first = F.scaled_dot_product_attention(q[..., :1, :], k, v)
        sample, head = (torch.arange(count).view(shape) for count, shape in ((q.shape[0], (-1, 1, 1, 1)), (q.shape[1], (-1, 1, 1))))
        near, values = k[sample, head, places], v[sample, head, places]
        others = F.scaled_dot_product_attention(q[..., 1:, None, :], near, values)[..., 0, :]
        return torch.cat([first, others], -2)


class ForNothing(nn.Module):
    def __init__(self, gathered: Gathered, qkv: Tensor):
        super().__init__()
        self.known = gathered.places(qkv)

    def forward(self, qkv: Tensor) -> Tensor:
        return Gathered.attend(qkv, self.known)


def mechanisms(batch: int, rounds: int) -> Report:
    torch.set_num_threads(2)
    comparisons = []
    for side in SIDES:
        qkv = torch.randn(3, batch, HEADS, side**2 + 1, WIDTH, generator=torch.Generator().manual_seed(0))
        for share in SHARES:
            sides = {"masked": Masked(side, share), "gathered": Gathered(side, share), "predictor": Predictor(side, share)}
            for module in sides.values():  # of one predictor
                module.load_state_dict(sides["masked"].state_dict())
            sides["gathered, masks for nothing"] = ForNothing(sides["gathered"], qkv)
            torch.testing.assert_close(sides["gathered"](qkv), sides["masked"](qkv))
            for name, module in sides.items():
                comparisons.append(compare(f"{name}, {side**2 + 1} tokens, {share:.0%} of keys", FORWARD, module, Full(), qkv, rounds,
                                            time.perf_counter))
    return Report(facts(batch, {"tokens": ", ".join(str(side**2 + 1) for side in SIDES)}, "float32", rounds, "cpu", True), comparisons)


if __name__ == "__main__":
    report = mechanisms(batch=1, rounds=5)
    least = min(1 / row.ratios[1] for row in report.comparisons)
    print(HEAD.format(heads=HEADS, width=WIDTH, table=report.markdown(), least=least))
