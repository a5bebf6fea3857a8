"""What no formulation can be faster than: a network's products alone, each in the fastest of the ways that there are on this CPU.

    python -m benchmarks.floor litv2_s attnet_t2 --threads 1

Every convolution, linear layer and attention of the zoo's network (the kernel's product of token merging among them) is timed by itself
on the shapes that it meets at batch 4, with warm caches: as `F.linear`, oneDNN's inner product or 1×1 convolution, in every memory layout,
as torch's attention or its formula. The best times are added up and stand beside that of the authors' formulation. Activations,
norms, sums, copies and what it takes to sample are left out. Time is the process's with one thread, the clock's with more.
"""
import argparse
import importlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.kernels import _linear
from zoo.measuring.model_benchmark import FORWARD, PASSES, keep_freed_memory
from zoo.threads import torch_threads

BATCH, ROUNDS = 4, 7
LAST = torch.channels_last
Key = tuple[Any, ...]


class _Products(TorchDispatchMode):
    """Counts the products that run inside, by kind and shapes."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, shapes = func.overloadpacket.__name__, [tuple(x.shape) if isinstance(x, Tensor) else x for x in args]
        if name == "convolution":
            x, weight, _, stride, padding, *_, groups = shapes
            if weight[2:] == (1, 1) and groups == 1:
                self.seen["linear", x[0] * math.prod(x[2:]), *weight[1::-1]] += 1
            else:
                self.seen["convolution", x, weight, tuple(stride), tuple(padding), groups] += 1
        elif name == "_linear_pointwise":
            self.seen["linear", math.prod(shapes[0][:-1]), *shapes[1][::-1]] += 1
        elif name in ("mm", "addmm"):
            left, right = shapes[-2:]
            self.seen["linear", *left, right[1]] += 1
        elif name.startswith("_scaled_dot_product"):
            self.seen["attention", *shapes[:3]] += 1
        elif name.startswith("deform_conv2d"):
            offset, weight = shapes[1:3]
            self.seen["linear", offset[0] * math.prod(offset[2:]), math.prod(weight[1:]), weight[0]] += 1
        return func(*args, **kwargs or {})


def _ways(kind: str, *shapes: Any) -> list[tuple[Callable[..., Tensor], list[Tensor]]]:
    """Functions that compute a product, and what each takes."""
    if kind == "attention":
        q, k, v = map(torch.randn, shapes)
        return [(F.scaled_dot_product_attention, [q, k, v]), (lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v, [q, k, v])]
    if kind == "linear":
        rows, dim, out = shapes
        x, weight, bias = torch.randn(rows, dim), torch.randn(out, dim), torch.randn(out)
        return [(F.linear, [x, weight, bias]), (_linear.linear, [x, weight, bias]),
                *((F.conv2d, [x.T.reshape(1, dim, -1, 1).contiguous(memory_format=layout), weight[:, :, None, None], bias])
                  for layout in (LAST, torch.contiguous_format))]
    x, weight, stride, padding, groups = torch.randn(shapes[0]), torch.randn(shapes[1]), *shapes[2:]
    cases = [(x.contiguous(memory_format=layout), weight, groups) for layout in (LAST, torch.contiguous_format)]
    if 1 < groups == x.shape[1]:  # the batch beside the channels
        merged = x.flatten(0, 1)[None].contiguous(memory_format=LAST)
        cases.append((merged, weight.repeat(len(x), 1, 1, 1), groups * len(x)))
    return [(lambda x, weight, groups=groups: F.conv2d(x, weight, None, stride, padding, 1, groups), [x, weight])
            for x, weight, groups in cases]


def _best(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def _product(key: Key, kind: str, clock: Callable[[], float]) -> float:
    found = []
    for function, inputs in _ways(*key):
        if kind == FORWARD:
            with torch.inference_mode():
                found.append(_best(partial(function, *inputs), clock))
            continue
        leaves = [x.requires_grad_() for x in inputs]
        cotangent = torch.randn_like(function(*leaves))
        found.append(_best(partial(_gradients, function, leaves, cotangent), clock))
    return min(found)


def _gradients(function: Callable[..., Tensor], leaves: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*leaves), leaves, cotangent)


def _network(model: nn.Module, images: Tensor, kind: str, clock: Callable[[], float]) -> float:
    model.train(kind != FORWARD)
    with torch.inference_mode(kind == FORWARD):
        return _best(lambda: model(images) if kind == FORWARD else model(images).sum().backward(), clock)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="model", choices=zoo.list_models(), help="of a family with benchmarks/…_authors.py")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    clock = time.process_time if args.threads == 1 else time.perf_counter
    images = torch.randn(BATCH, 3, 224, 224)
    with torch_threads(args.threads):
        for name in args.models:
            with _Products() as products:
                timm.create_model(name)(images)
            rival = importlib.import_module(f"benchmarks.{name.partition('_')[0]}_authors").build(name)
            for kind in PASSES:
                theirs = _network(rival, images, kind, clock)
                floor: dict[str, float] = defaultdict(float)
                for key, count in products.seen.items():
                    floor[key[0]] += count * _product(key, kind, clock)
                total, parts = sum(floor.values()), ", ".join(f"{what} {seconds * 1e3:.0f}" for what, seconds in floor.items())
                print(f"{name}, {kind}, {args.threads} threads: {parts}, together {total * 1e3:.0f} ms; the authors' formulation "
                      f"{theirs * 1e3:.0f} ms, which is {theirs / total:.2f} times that", flush=True)


if __name__ == "__main__":
    main()
