"""The problems that `make gpu` measures, operator by operator, each with its rivals: CASES."""
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import torchvision
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from zoo import kernels
from zoo.layers._positions_first import positions_first
from zoo.measuring.kernel_benchmark import Case, Cases, Side

from .biformer_authors import _cut, _paste

BATCHES = {(224, 224): 64, (512, 512): 16, (800, 1333): 2}  # by image size
REGIONS = 7
BIFORMER_STAGES = ((4, 1), (8, 4), (16, 16))  # stride and top-k
BIFORMER_WIDTHS = {"T and S": 64, "B": 96}  # of the first stage; heads have 32 channels


def leaf(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def side(function: Callable[..., Tensor], *leaves: Tensor) -> Side:
    return Side(lambda: function(*leaves), leaves)


def moved(leaves: tuple[Tensor, ...], out: int) -> tuple[int, int]:
    """Bytes: inputs read and `out` elements written; backward inputs, result and its gradient read, gradients written."""
    inputs, result = sum(x.nbytes for x in leaves), out * leaves[0].element_size()
    return inputs + result, 3 * inputs + 3 * result


def routing_attention(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Stages of BiFormer: ours against the authors' gather, and against dense attention over as many keys, already gathered."""
    sizes, widths = ({(32, 64): 1}, {"T and S": 64}) if small else (BATCHES, BIFORMER_WIDTHS)
    stages = itertools.product(widths.items(), sizes.items(), enumerate(BIFORMER_STAGES, 1))
    for (name, width), (size, batch), (stage, (stride, topk)) in stages:
        dim, regions = width * stride // 4, 2 if small else REGIONS
        heads, topk = dim // 32, min(topk, regions**2)
        rows, columns = (math.ceil(n / stride) for n in size)
        region = math.ceil(rows / regions), math.ceil(columns / regions)
        places, keys, scale = math.prod(region), topk * math.prod(region), dim**-0.5
        qkv = leaf(device, dtype, batch, rows, columns, 3 * dim)
        q, k, _ = qkv.detach().split(dim, -1)
        by_affinity, _ = kernels.region_routes(q, k, (regions, regions), topk)
        dense = [leaf(device, dtype, batch * regions**2, heads, n, 32) for n in (places, keys, keys)]
        bytes_moved = tuple(n + f * by_affinity.nbytes for n, f in zip(moved((qkv,), batch * rows * columns * dim), (1, 3), strict=True))
        products = 2 * batch * regions**2 * places * keys * dim
        ways = {"": by_affinity}
        if topk == 1:  # one program then goes over all queries of the image for a tile of keys
            ways[", all to one region"] = torch.zeros_like(by_affinity)
        for way, routes in ways.items():
            given = dict(routes=routes, regions=regions, heads=heads, scale=scale)
            yield Case("routing_attention", f"BiFormer-{name} stage {stage}, {size[0]}×{size[1]}, batch {batch}{way}",
                       side(functools.partial(_routed, **given), qkv),
                       {"authors": side(functools.partial(_gathered, **given), qkv),
                        "dense sdpa": side(F.scaled_dot_product_attention, *dense)},
                       bytes_moved, (2 * products, 7 * products))


def _routed(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    return kernels.routing_attention(*qkv.chunk(3, -1), routes, (regions, regions), heads, scale=scale)


def _gathered(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    """The paper's algorithm 1: padded, the routed regions' keys and values copied, two products around a softmax."""
    height, width = qkv.shape[1:3]
    qkv = F.pad(qkv, (0, 0, 0, -width % regions, 0, -height % regions))
    q, key, value = _cut(qkv, regions).chunk(3, dim=-1)
    b, r, h, w, c = q.shape
    kv = torch.cat([key, value], -1).reshape(b, 1, r, h * w, 2 * c).expand(-1, r, -1, -1, -1)
    kv = kv.gather(2, routes[..., None, None].expand(-1, -1, -1, h * w, 2 * c))
    key, value = kv.reshape(b * r, -1, 2, heads, c // heads).permute(2, 0, 3, 1, 4)
    q = q.reshape(b * r, h * w, heads, c // heads).transpose(1, 2)
    attention = ((q * scale) @ key.transpose(-2, -1)).softmax(-1)
    return _paste((attention @ value).transpose(1, 2).reshape(b, r, h, w, c), regions)[:, :height, :width]


def region_routes(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Affinities of region means, differentiable as with soft routing."""
    for size, batch in ({(16, 16): 1} if small else BATCHES).items():
        regions, dim = (2, 2) if small else (REGIONS, REGIONS), 64
        rows, columns = (n // 4 for n in size)
        q, k = leaf(device, dtype, batch, rows, columns, dim), leaf(device, dtype, batch, rows, columns, dim)

        def scores(q: Tensor, k: Tensor, backend: str | None, regions: tuple[int, int] = regions) -> Tensor:
            return kernels.region_routes(q, k, regions, 4, backend)[1]

        yield Case("region_routes", f"BiFormer stage 1, {size[0]}×{size[1]}, batch {batch}",
                   side(lambda q, k, f=scores: f(q, k, None), q, k), {"pytorch": side(lambda q, k, f=scores: f(q, k, "pytorch"), q, k)},
                   (2 * q.nbytes, 4 * q.nbytes), (2 * q.numel(), 4 * q.numel()))


class _Given(nn.Module):
    """Takes the place of a projection whose result is at hand."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.result = result

    def forward(self, _: Tensor) -> Tensor:
        return self.result


def halo_attention(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Stages of HaloNet-H2 at 256²: ours against timm's blocks and windows, and against FlexAttention, compiled."""
    block, halo = 8, 3
    for stage, (side_length, heads, head) in enumerate([(16, 1, 16)] if small else [(64, 4, 16), (32, 8, 16), (16, 8, 32), (8, 8, 64)], 1):
        batch, dim, window = 1 if small else 64, heads * head, block + 2 * halo
        maps = [leaf(device, dtype, batch, side_length, side_length, heads, head) for _ in range(3)]
        tables = [leaf(device, dtype, window + block - 1, head) for _ in range(2)]
        projected = [leaf(device, dtype, batch, channels, side_length, side_length) for channels in (dim, 2 * dim)]
        attention = HaloAttn(dim, num_heads=heads, block_size=block, halo_size=halo).to(device, dtype)
        attention.q, attention.kv = map(_Given, projected)
        rivals = {"timm": Side(lambda f=attention, x=projected[0]: f(x), (*projected, *attention.pos_embed.parameters()))}
        if device != "cpu" and stage in (1, 3):  # each takes a quarter of a minute to compile
            flex = torch.compile(_flex_halo, dynamic=False)  # the second stage is not the first with other sizes
            mask = _flex_mask(side_length, block, halo, device)
            rivals["FlexAttention"] = side(lambda *x, f=flex, m=mask: f(*x, block, halo, m), *maps, *tables)
        products = 2 * maps[0].numel() * window**2
        yield Case("halo_attention", f"HaloNet-H2 stage {stage}, {side_length}², batch {batch}",
                   side(lambda *x: kernels.halo_attention(*x, block, halo), *maps, *tables), rivals,
                   moved((*maps, *tables), maps[0].numel()), (2 * products, 7 * products))


def _flex_mask(length: int, block: int, halo: int, device: str) -> object:
    from torch.nn.attention.flex_attention import create_block_mask
    bordered = length + 2 * halo

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        y, x = j // bordered - i // length // block * block, j % bordered - i % length // block * block
        return (y >= 0) & (y < block + 2 * halo) & (x >= 0) & (x < block + 2 * halo)

    return create_block_mask(within, None, None, length**2, bordered**2, device=device)


def _flex_halo(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block: int, halo: int, mask: object) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention
    length = q.shape[1]
    bordered, last = length + 2 * halo, len(rel_h) - 1
    k, v = (F.pad(x, (0, 0, 0, 0, halo, halo, halo, halo)).flatten(1, 2).transpose(1, 2) for x in (k, v))
    q = q.flatten(1, 2).transpose(1, 2)
    rows, columns = q @ rel_h.T, q @ rel_w.T

    def relative(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        y = j // bordered - i // length // block * block - i // length % block + block - 1
        x = j % bordered - i % length // block * block - i % length % block + block - 1
        return score + rows[b, h, i, y.clamp(0, last)] + columns[b, h, i, x.clamp(0, last)]

    return flex_attention(q, k, v, score_mod=relative, block_mask=mask)


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

        def theirs(*tensors: Tensor, stride=stride, padding=padding) -> Tensor:
            x, offset, weight, *mask = (t.float() for t in tensors)
            return torchvision.ops.deform_conv2d(x, offset, weight, None, stride, padding, 1, *mask).to(tensors[0].dtype)

        rivals = {"torchvision": side(theirs, *leaves)}
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
    """Stages of AttNet-T2, channels first and as the network keeps them: ours against a grouped convolution, inhibition included."""
    stages = enumerate([(6, 5)] if small else [(64, 56), (128, 28), (288, 14), (512, 7)], 1)
    for (stage, (channels, size)), layout in itertools.product(stages, ("channels first", "positions first")):
        batch = 2 if small else 64
        first, weight = leaf(device, dtype, batch, channels, size, size), leaf(device, dtype, batch, channels, 3, 3)
        theta = leaf(device, dtype, channels)
        x = first if layout == "channels first" else positions_first(first.detach()).requires_grad_()
        yield Case("depthwise_dynamic_conv2d", f"AttNet-T2 stage {stage}, {channels}×{size}², batch {batch}, {layout}",
                   side(kernels.depthwise_dynamic_conv2d, x, weight, theta),
                   {"grouped, channels first": side(_grouped, first, weight, theta)},
                   moved((x, weight, theta), x.numel()), (18 * x.numel(), 54 * x.numel()))


def _grouped(x: Tensor, weight: Tensor, theta: Tensor) -> Tensor:
    b, c, h, w = x.shape
    weight = weight - theta.sigmoid()[:, None, None] * weight.mean((2, 3), keepdim=True)
    return F.conv2d(x.reshape(1, b * c, h, w), weight.reshape(b * c, 1, 3, 3), padding=1, groups=b * c).reshape(b, c, h, w)


def token_aware_avg_pool(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """TAP-FAN-B: ours against the pools one by one."""
    batch, size, channels, pools = (1, 5, 8, 3) if small else (64, 14, 448, 4)
    x, weights = leaf(device, dtype, batch, size, size, channels), leaf(device, dtype, batch, size, size, pools)
    yield Case("token_aware_avg_pool", f"TAP-FAN-B, {size}²×{channels}, batch {batch}", side(kernels.token_aware_avg_pool, x, weights),
               {"pool by pool": side(_pools, x, weights)},
               moved((x, weights), x.numel()), (9 * (pools - 1) * 2 * x.numel(), 3 * 9 * (pools - 1) * 2 * x.numel()))


def _pools(x: Tensor, weights: Tensor) -> Tensor:
    maps, dim = x.permute(0, 3, 1, 2), x.shape[-1]
    box = maps.new_full((dim, 1, 3, 3), 1 / 9)
    pools = [x, *(F.conv2d(maps, box, padding=d, dilation=d, groups=dim).permute(0, 2, 3, 1) for d in range(1, weights.shape[-1]))]
    return sum(pool * weights[..., i : i + 1] for i, pool in enumerate(pools))


# Operators that this checkout lacks are left out.
CASES: dict[str, Cases] = {
    cases.__name__: cases
    for cases in (routing_attention, region_routes, halo_attention, deform_conv2d, depthwise_dynamic_conv2d, token_aware_avg_pool)
    if hasattr(kernels, cases.__name__)
}


def tuning_cases(device: str, dtype: torch.dtype, small: bool) -> list[Case]:
    """Of every operator and kind of problem one: BiFormer-B's stages run the same kernels under the same keys as S's."""
    everything = (case for cases in CASES.values() for case in cases(device, dtype, small))
    return [case for case in everything if "BiFormer-B" not in case.name and "one region" not in case.name]
