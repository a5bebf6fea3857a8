"""What no token merging can be faster than: LITv2's ordinary layers alone, each at its best, forward plus backward.

    python -m benchmarks.litv2_floor

Every convolution and linear layer outside token merging and every attention of `litv2_s` is timed by itself on the shapes it
meets at batch 4, with warm caches, and the best of nine times is added up. Activations, norms and sums are left out.
"""
import time
from collections import Counter
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo  # noqa: F401  registers the models
from zoo.layers import DeformableTokenMerging
from zoo.measuring.model_benchmark import keep_freed_memory

BATCH, ROUNDS = 4, 9


def _best(run: Callable[..., Tensor], *inputs: Tensor, parameters: tuple[Tensor, ...] = ()) -> float:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    cotangent, times = torch.randn_like(run(*inputs)), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        torch.autograd.grad(run(*inputs), (*inputs, *parameters), cotangent)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    torch.set_num_threads(2)
    keep_freed_memory()
    model, calls, examples = timm.create_model("litv2_s").train(), Counter(), {}
    merging = {id(part) for module in model.modules() if isinstance(module, DeformableTokenMerging) for part in module.modules()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        key = type(module), tuple(inputs[0].shape), tuple(module.weight.shape), getattr(module, "groups", 1)
        calls[key] += 1
        examples.setdefault(key, (module, inputs[0]))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module) not in merging:
            module.register_forward_hook(note)
    attention, compute = Counter(), F.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        attention[tuple(map(tuple, (q.shape, k.shape, v.shape)))] += 1
        return compute(q, k, v)

    F.scaled_dot_product_attention = noted
    try:
        model(torch.randn(BATCH, 3, 224, 224))
    finally:
        F.scaled_dot_product_attention = compute

    layers = sum(calls[key] * _best(module.forward, x, parameters=tuple(module.parameters())) for key, (module, x) in examples.items())
    attentions = sum(count * _best(compute, *map(torch.randn, shapes)) for shapes, count in attention.items())
    print(f"convolutions and linear layers {layers * 1e3:.0f} ms, attention {attentions * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
