"""Does it pay to leave out the queries of heads that tokens did not pick? Attention of all queries, then gates, against the picked ones.

    python -m benchmarks.moh_queries
    python -m benchmarks.moh_queries share   # what of a network's time that attention is: two minutes

Picked queries of every routed head are gathered to the front, up to the longest head's number, which has to be asked of the scores;
all keys and values are needed. Times are of attention and gates alone, without projections, on one thread of the CPU, without gradients.
"""
import statistics
import sys
import time
from functools import partial
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo  # noqa: F401  registers the models

CASES = [(12, 64, 3, 6, n) for n in (197, 1025, 4097)] + [(32, 24, 4, 8, n) for n in (49, 196, 1024, 4096)]
ROUNDS = 5


def dense(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Gates (B, heads, N)."""
    return F.scaled_dot_product_attention(q, k, v) * gates[..., None]


def picked(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, shared: int) -> Tensor:
    routed = gates[:, shared:]
    active = routed > 0
    most = int(active.sum(-1).max())
    order = active.byte().argsort(dim=-1, descending=True, stable=True)[..., :most, None]
    d = q.shape[-1]
    some = F.scaled_dot_product_attention(q[:, shared:].gather(2, order.expand(-1, -1, -1, d)), k[:, shared:], v[:, shared:])
    some = some * routed.gather(2, order[..., 0])[..., None]
    out = torch.zeros_like(q)
    out[:, shared:].scatter_(2, order.expand(-1, -1, -1, d), some)
    out[:, :shared] = dense(q[:, :shared], k[:, :shared], v[:, :shared], gates[:, :shared])
    return out


def example(heads: int, d: int, shared: int, active: int, n: int, uneven: float, batch: int = 1) -> tuple[Tensor, ...]:
    """Scores drawn for every token, and for every head, `uneven` times as far apart."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, n, d, generator=generator)
    scores = torch.randn(batch, n, heads - shared, generator=generator) + uneven * torch.randn(heads - shared, generator=generator)
    routed = torch.zeros_like(scores).scatter(-1, scores.topk(active, -1).indices, 1.0)
    return q, k, v, torch.cat([torch.ones(batch, n, shared), routed], -1).transpose(1, 2)


def _times(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, shared: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both, taking turns."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        for seconds, run in zip(times, (dense, partial(picked, shared=shared)), strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                run(q, k, v, gates)
            seconds.append((time.perf_counter() - start) / repeats)
    return times


def share(size: int) -> tuple[float, float]:
    """Seconds of a forward pass of moh_transnext_base_50 on one image, and of attention in its stage of all positions, the second time."""
    model, x, seconds = timm.create_model("moh_transnext_base_50").eval(), torch.randn(1, 3, size, size), []
    attend = F.scaled_dot_product_attention

    def timed(*args: Tensor, **options: float) -> Tensor:
        start = time.perf_counter()
        out = attend(*args, **options)
        seconds.append(time.perf_counter() - start)
        return out

    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", timed):
        model(x)
        seconds.clear()
        start = time.perf_counter()
        model(x)
        return time.perf_counter() - start, sum(seconds)


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    if wanted == ["share"]:
        for size in (448, 1024):
            whole, attention = share(size)
            print(f"{size}×{size}: {attention:.3f} of {whole:.3f} s, {100 * attention / whole:.1f} %", flush=True)
        return
    print("| heads (shared + active of others) | head width | tokens | scores | all queries, ms | picked, ms | all / picked |\n"
          "| --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for heads, d, shared, active, n in CASES:
        for scores, uneven in (("balanced", 0.0), ("uneven", 1.0)):
            q, k, v, gates = example(heads, d, shared, active, n, uneven)
            torch.testing.assert_close(picked(q, k, v, gates, shared), dense(q, k, v, gates), atol=1e-5, rtol=1e-4)
            one, other = (1e3 * statistics.median(seconds) for seconds in _times(q, k, v, gates, shared, max(1, 1000 // n)))
            print(f"| {heads} ({shared} + {active} of {heads - shared}) | {d} | {n} | {scores} | {one:.2f} | {other:.2f} "
                  f"| {one / other:.2f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
