"""The problems that `make gpu` measures, operator by operator, the most telling first, each with its rivals: CASES."""
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from zoo import kernels
from zoo.layers import HaloAttention, pyramid_levels
from zoo.layers._positions_first import positions_first
from zoo.measuring.kernel_benchmark import Case, Cases, Side

from . import kernel_rivals

BATCHES = {(224, 224): 64, (800, 1333): 2, (512, 512): 16}  # by image size
SCANNED = 16  # images
REGIONS = 7
BIFORMER_STAGES = ((4, 1), (8, 4), (16, 16))  # stride and top-k
MOST_MASKED = 1024  # positions of a map whose scores are worth masking
BIFORMER_WIDTHS = {"T and S": 64, "B": 96}  # of the first stage; heads have 32 channels


def leaf(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def side(function: Callable[..., Tensor], *leaves: Tensor) -> Side:
    return Side(lambda: function(*leaves), leaves)


def moved(leaves: tuple[Tensor, ...], out: int) -> tuple[int, int]:
    """Bytes: inputs read and `out` elements written; backward inputs, result and its gradient read, gradients written."""
    inputs, result = sum(x.nbytes for x in leaves), out * leaves[0].element_size()
    return inputs + result, 3 * inputs + 3 * result


def compiled(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """As who wants speed would call it; each takes seconds to compile, so the CPU runs it as it is."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function


def routing_attention(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Stages of BiFormer. The floor is flash attention of the same queries over the same keys, already gathered."""
    sizes, widths = ({(96, 96): 1, (28, 52): 2}, {"T and S": 64}) if small else (BATCHES, BIFORMER_WIDTHS)
    stages = itertools.product(widths.items(), enumerate(BIFORMER_STAGES, 1), sizes.items())
    for (name, width), (stage, (stride, topk)), (size, batch) in stages:
        dim, regions = width * stride // 4, 3 if small else REGIONS
        heads, topk = dim // 32, min(topk, regions**2)
        rows, columns = (math.ceil(n / stride) for n in size)
        region = math.ceil(rows / regions), math.ceil(columns / regions)
        places, keys, scale = math.prod(region), topk * math.prod(region), dim**-0.5
        qkv = leaf(device, dtype, batch, rows, columns, 3 * dim)
        q, k, _ = qkv.detach().split(dim, -1)
        by_affinity, _ = kernels.region_routes(q, k, (regions, regions), topk)
        bytes_moved = tuple(n + f * by_affinity.nbytes for n, f in zip(moved((qkv,), batch * rows * columns * dim), (1, 3), strict=True))
        products = 2 * batch * regions**2 * places * keys * dim
        ways = {"": by_affinity}
        if topk == 1:  # one program then goes over all queries of the image for a tile of keys
            ways[", all to one region"] = torch.zeros_like(by_affinity)
        for way, routes in ways.items():
            given = dict(routes=routes, regions=regions, heads=heads, scale=scale)
            others = {"authors": kernel_rivals.gathered, "gathered sdpa": kernel_rivals.gathered_sdpa, "varlen flash": kernel_rivals.varlen}
            if rows * columns <= MOST_MASKED:
                others["masked sdpa"] = kernel_rivals.masked_sdpa
            if name == "T and S" and not way:
                others["FlexAttention, compiled"] = kernel_rivals.flex_routes
            rivals = {rival: side(functools.partial(function, **given), qkv) for rival, function in others.items()}
            picked = (x.detach().contiguous().requires_grad_() for x in kernel_rivals.gathered_heads(qkv, routes, regions, heads)[:3])
            floor = {"floor: flash attention, keys gathered": side(functools.partial(F.scaled_dot_product_attention, scale=scale), *picked)}
            yield Case("routing_attention", f"BiFormer-{name} stage {stage}, {size[0]}×{size[1]}, batch {batch}{way}",
                       side(functools.partial(_routed, **given), qkv), rivals, bytes_moved, (2 * products, 7 * products), floor)


def _routed(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    return kernels.routing_attention(*qkv.chunk(3, -1), routes, (regions, regions), heads, scale=scale)


def region_routes(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Affinities of region means, differentiable as with soft routing."""
    for size, batch in ({(16, 16): 1} if small else BATCHES).items():
        regions, dim = 2 if small else REGIONS, 64
        rows, columns = (math.ceil(n / 4) for n in size)
        q, k = leaf(device, dtype, batch, rows, columns, dim), leaf(device, dtype, batch, rows, columns, dim)

        def scores(q: Tensor, k: Tensor, regions: int = regions) -> Tensor:
            return kernels.region_routes(q, k, (regions, regions), 4)[1]

        theirs = functools.partial(compiled(kernel_rivals.pooled_affinity, device), regions=regions, topk=4)
        yield Case("region_routes", f"BiFormer stage 1, {size[0]}×{size[1]}, batch {batch}", side(scores, q, k),
                   {"pooled, compiled": side(theirs, q, k)}, (2 * q.nbytes, 4 * q.nbytes), (2 * q.numel(), 4 * q.numel()))


def halo_attention(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Layers of HaloNet-H2 at 256² as the network calls them, projections included."""
    block, halo = 8, 3
    for stage, (length, heads, head) in enumerate([(16, 1, 16)] if small else [(64, 4, 16), (32, 8, 16), (16, 8, 32), (8, 8, 64)], 1):
        batch, dim, window = 1 if small else 64, heads * head, block + 2 * halo
        layer = HaloAttention(dim, num_heads=heads, block_size=block, halo_size=halo).to(device, dtype)
        theirs = kernel_rivals.timm_halo(layer)
        x = leaf(device, dtype, batch, dim, length, length)
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()  # as the network's stages keep it
        rivals = {"timm": Side(lambda f=theirs, x=x: f(x), (x, *theirs.parameters()))}
        if stage in (1, 3):  # each takes a quarter of a minute to compile
            flex = functools.partial(kernel_rivals.flex_halo, heads=heads, block=block, halo=halo,
                                     mask=kernel_rivals.halo_mask(length, block, halo, device))
            rivals["FlexAttention, compiled"] = side(flex, x, *layer.parameters())
        products = 2 * x.numel() * window**2
        projections = 2 * x.numel() * 3 * dim
        bytes_moved, bytes_moved_back = moved((x, *layer.parameters()), x.numel())
        yield Case("halo_attention", f"HaloNet-H2 stage {stage}, {length}², batch {batch}",
                   Side(lambda f=layer, x=x: f(x), (x, *layer.parameters())), rivals,
                   (bytes_moved + 6 * x.nbytes, bytes_moved_back + 18 * x.nbytes),
                   (2 * products + projections, 7 * products + 3 * projections))


def deform_conv2d(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """DAS-ResNet50's gates, LITv2-S's token merging and a modulated convolution of a detector: ours against torchvision, and mmcv.

    torchvision has no bfloat16 and computes in float32, as it does under autocast.
    """
    shapes = [  # name, channels, out, size, kernel, stride, groups, masked
        ("DAS stage 1", 48, 256, 56, 3, 1, 16, False), ("DAS stage 3", 192, 1024, 14, 3, 1, 64, False),
        ("LITv2-S merging 1", 96, 192, 56, 2, 2, 1, False), ("LITv2-S merging 3", 384, 768, 14, 2, 2, 1, False),
        ("DCNv2", 256, 256, 50, 3, 1, 1, True)]
    for name, channels, out, size, kernel, stride, groups, masked in [("small", 4, 6, 6, 3, 1, 2, True)] if small else shapes:
        batch, padding = 1 if small else 32, 1 if kernel == 3 else 0
        out_size = (size + 2 * padding - kernel) // stride + 1
        x, weight = leaf(device, dtype, batch, channels, size, size), leaf(device, dtype, out, channels // groups, kernel, kernel)
        if "LITv2" in name:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()  # as its tokens lie
        offset = leaf(device, dtype, batch, 2 * kernel**2, out_size, out_size)
        leaves = x, offset, weight, *([leaf(device, dtype, batch, kernel**2, out_size, out_size)] if masked else [])

        def ours(x, offset, weight, mask=None, stride=stride, padding=padding) -> Tensor:
            return kernels.deform_conv2d(x, offset, weight, None, stride, padding, 1, mask)

        def by_index(x, offset, weight, mask=None, stride=stride, padding=padding) -> Tensor:
            return kernels.deform_conv2d(x, offset, weight, None, stride, padding, 1, mask, backend="reference")

        def theirs(*tensors: Tensor, stride=stride, padding=padding) -> Tensor:
            x, offset, weight, *mask = (t.float() for t in tensors)
            return torchvision.ops.deform_conv2d(x, offset, weight, None, stride, padding, 1, *mask).to(tensors[0].dtype)

        rivals = {"torchvision": side(theirs, *leaves)}
        if name in ("small", "DAS stage 1", "LITv2-S merging 1", "DCNv2"):
            rivals["gathered, compiled"] = side(compiled(by_index, device), *leaves)
        if (mmcv := _mmcv_deform_conv2d()) is not None:
            rivals["mmcv"] = side(lambda *tensors, f=mmcv, s=stride, p=padding, g=groups: f(*tensors, s, p, g), *leaves)
        products = 2 * batch * out_size**2 * weight.numel()
        yield Case("deform_conv2d", f"{name}, {channels}×{size}² → {out}×{out_size}², batch {batch}", side(ours, *leaves), rivals,
                   moved(leaves, batch * out * out_size**2), (products, 3 * products))


def _mmcv_deform_conv2d() -> Callable[..., Tensor] | None:
    try:
        from mmcv.ops import deform_conv2d, modulated_deform_conv2d
    except ImportError:
        return None

    def compute(x: Tensor, offset: Tensor, weight: Tensor, *rest: Tensor | int) -> Tensor:
        *mask, stride, padding, groups = rest
        if mask:
            return modulated_deform_conv2d(x, offset, *mask, weight, None, stride, padding, 1, groups, 1)
        return deform_conv2d(x, offset, weight, stride, padding, 1, groups, 1)

    return compute


def depthwise_dynamic_conv2d(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Stages of AttNet-T2, channels first and as the network keeps them, inhibition included."""
    stages = enumerate([(6, 5)] if small else [(64, 56), (128, 28), (288, 14), (512, 7)], 1)
    for layout, (stage, (channels, size)) in itertools.product(("channels first", "positions first"), stages):
        batch = 2 if small else 64
        first, weight = leaf(device, dtype, batch, channels, size, size), leaf(device, dtype, batch, channels, 3, 3)
        theta = leaf(device, dtype, channels)
        x = first if layout == "channels first" else positions_first(first.detach()).requires_grad_()
        rivals = {"grouped": side(kernel_rivals.grouped, first, weight, theta)}  # in the layout that it likes best
        if layout == "channels first" and stage in (1, 3):
            for name, function in (("grouped, compiled", kernel_rivals.grouped), ("unfolded, compiled", kernel_rivals.unfolded)):
                rivals[name] = side(compiled(function, device), first, weight, theta)
        yield Case("depthwise_dynamic_conv2d", f"AttNet-T2 stage {stage}, {channels}×{size}², batch {batch}, {layout}",
                   side(kernels.depthwise_dynamic_conv2d, x, weight, theta), rivals,
                   moved((x, weight, theta), x.numel()), (18 * x.numel(), 54 * x.numel()))


def token_aware_avg_pool(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """TAP-FAN-B: ours against the pools one by one."""
    batch, size, channels, pools = (1, 5, 8, 3) if small else (64, 14, 448, 4)
    x, weights = leaf(device, dtype, batch, size, size, channels), leaf(device, dtype, batch, size, size, pools)
    yield Case("token_aware_avg_pool", f"TAP-FAN-B, {size}²×{channels}, batch {batch}", side(kernels.token_aware_avg_pool, x, weights),
               {"pool by pool": side(kernel_rivals.pool_by_pool, x, weights),
                "pool by pool, compiled": side(compiled(kernel_rivals.pool_by_pool, device), x, weights)},
               moved((x, weights), x.numel()), (9 * (pools - 1) * 2 * x.numel(), 3 * 9 * (pools - 1) * 2 * x.numel()))


def pyramid_sparse_attention(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Rows of an image of 64² and 128² tokens, levels as the layer chooses them, beside all levels masked, and dense attention."""
    batch, heads, width, block = (1, 2, 16, (16, 16)) if small else (4, 6, 64, (128, 128))
    for side_of_map in (12,) if small else (64, 128):
        tokens = side_of_map**2
        q, k, v = (leaf(device, dtype, batch, heads, tokens, width) for _ in range(3))
        levels = pyramid_levels(q.detach(), k.detach(), block, generator=torch.Generator().manual_seed(0))
        given: dict[str, Any] = dict(levels=levels, block_size=block)
        rivals = {}
        if tokens <= 4096:  # both hold a mask of all tokens and means
            rivals["all levels, masked"] = side(functools.partial(kernels.pyramid_sparse_attention, backend="reference", **given), q, k, v)
            flex = functools.partial(kernel_rivals.flex_pyramid, mask=kernel_rivals.pyramid_mask(levels, block, tokens), **given)
            rivals["FlexAttention, compiled"] = side(flex, q, k, v)
        scores = sum(int((levels == level).sum()) * block[0] * block[1] // level for level in (1, 2, 4, 8))
        yield Case("pyramid_sparse_attention", f"{side_of_map}² tokens, {heads} heads of {width}, batch {batch}",
                   side(functools.partial(kernels.pyramid_sparse_attention, **given), q, k, v), rivals, moved((q, k, v), q.numel()),
                   (4 * scores * width, 14 * scores * width), {"dense: flash attention": side(F.scaled_dot_product_attention, q, k, v)})


def selective_scan(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The four directions of SS2D in VMamba-S as SUM has it, at 256², channels innermost. Parameters are float32.

    Operations are those of the recurrence, six for every state and position, of which the exponential is one.
    """
    stages = enumerate([(2, 3)] if small else [(96, 64), (192, 32), (384, 16), (768, 8)], 1)
    for stage, (dim, size) in stages:
        batch, channels, states, groups, length = 2 if small else SCANNED, 8 * dim, 3 if small else 16, 4, size**2
        u, delta = (leaf(device, dtype, batch, length, channels).detach().transpose(1, 2).requires_grad_() for _ in range(2))
        b, c = (leaf(device, dtype, batch, length, groups, states).detach().permute(0, 2, 3, 1).requires_grad_() for _ in range(2))
        a = (-torch.rand(channels, states, device=device) - 0.1).requires_grad_()
        d, bias = (torch.randn(channels, device=device).requires_grad_() for _ in range(2))
        leaves = u, delta, a, b, c, d, bias
        scan = functools.partial(kernels.selective_scan, delta_softplus=True)
        by_chunk = functools.partial(scan, backend="reference")
        rivals = {"in chunks": side(by_chunk, *leaves), "recomputed": side(functools.partial(scan, backend="recomputed"), *leaves)}
        if length <= 256:  # of more positions these take minutes to compile, and seconds to run
            rivals["in chunks, compiled"] = side(compiled(by_chunk, device), *leaves)
            rivals["position by position"] = side(kernel_rivals.position_by_position, *leaves)
            rivals["position by position, compiled"] = side(compiled(kernel_rivals.position_by_position, device), *leaves)
        work = 6 * batch * channels * states * length
        yield Case("selective_scan", f"VMamba-S stage {stage}, {channels} channels, {size}², batch {batch}", side(scan, *leaves), rivals,
                   moved(leaves, u.numel()), (work, 3 * work))


# Operators that this checkout lacks are left out.
CASES: dict[str, Cases] = {
    cases.__name__: cases
    for cases in (routing_attention, region_routes, halo_attention, deform_conv2d, depthwise_dynamic_conv2d, token_aware_avg_pool,
                  pyramid_sparse_attention, selective_scan)
    if hasattr(kernels, cases.__name__)
}


def tuning_cases(device: str, dtype: torch.dtype, small: bool) -> list[Case]:
    """Of every operator and kind of problem one, without rivals: BiFormer-B's stages run the same kernels under the same keys as S's."""
    everything = (case._replace(rivals={}, floors={}) for cases in CASES.values() for case in cases(device, dtype, small))
    return [case for case in everything if "BiFormer-B" not in case.name and "one region" not in case.name]
