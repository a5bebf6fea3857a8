"""What a knowledgeable person would write in fifteen lines in the place of an operator: the rivals of `benchmarks.kernel_cases`.

Each computes what the operator does, with the same gradients; tests/kernels/test_kernel_cases.py compares them.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from zoo.kernels.pyramid_sparse_attention._pyramid import LEVELS, counts, pyramid
from zoo.layers import HaloAttention

from .biformer_authors import _cut, _paste


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


# Routing attention, of qkv (B, H, W, 3C) and routes (B, regions², n), in a grid of regions × regions.


def gathered(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    """The paper's algorithm 1: keys and values of the routed regions copied, two products around a softmax."""
    q, k, v, mask = gathered_heads(qkv, routes, regions, heads)
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return pasted_heads(scores.softmax(-1) @ v, regions, qkv)


def gathered_sdpa(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    """The same copies into torch's attention, under a mask where regions reach off the map."""
    q, k, v, mask = gathered_heads(qkv, routes, regions, heads)
    return pasted_heads(F.scaled_dot_product_attention(q, k, v, mask, scale=scale), regions, qkv)


def gathered_heads(qkv: Tensor, routes: Tensor, regions: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries (B·regions², heads, t, d), keys and values of their routes (…, n·t, d), and which keys are on the map, (…, 1, 1, n·t)."""
    x, on_map = _in_regions(qkv, regions)
    b, r, t, width = x.shape
    rows = (routes + r * torch.arange(b, device=routes.device)[:, None, None]).flatten()
    q, kv = x.flatten(0, 1).split((width // 3, width // 3 * 2), -1)
    k, v = kv.index_select(0, rows).reshape(b * r, -1, 2, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    mask = None if on_map is None else on_map[routes].reshape(b * r, 1, 1, -1)
    return q.unflatten(-1, (heads, -1)).transpose(1, 2), k, v, mask


def pasted_heads(out: Tensor, regions: int, qkv: Tensor) -> Tensor:
    """(B·regions², heads, t, d) → (B, H, W, heads·d)."""
    b, height, width, _ = qkv.shape
    h, w = -(-height // regions), -(-width // regions)
    return _paste(out.transpose(1, 2).reshape(b, regions**2, h, w, -1), regions)[:, :height, :width]


def _in_regions(x: Tensor, regions: int) -> tuple[Tensor, Tensor | None]:
    """(B, H, W, C) → (B, regions², t, C), and which positions are on the map, (regions², t); None: all."""
    height, width = x.shape[1:3]
    down, right = -height % regions, -width % regions
    cut = _cut(F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x, regions).flatten(2, 3)
    if not (down or right):
        return cut, None
    on_map = F.pad(x.new_ones(1, height, width, 1), (0, 0, 0, right, 0, down))
    return cut, _cut(on_map, regions).flatten(2)[0] > 0


def varlen(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    """Flash attention of sequences of unequal lengths: what is off the map is not copied, and nothing is masked."""
    b, height, width, channels = qkv.shape
    places = torch.arange(b * height * width, device=qkv.device).reshape(b, height, width, 1)
    own, on_map = _in_regions(places, regions)  # (B, r, t)
    own, routed = own[..., 0], own[..., 0].flatten(0, 1)
    rows = routes + regions**2 * torch.arange(b, device=routes.device)[:, None, None]
    routed = routed[rows].flatten(2)  # (B, r, n·t)
    lengths = [torch.full((b * regions**2,), index.shape[2], device=qkv.device) for index in (own, routed)]
    if on_map is not None:
        seen = on_map[routes].flatten(2)
        lengths = [on_map.sum(1).repeat(b), seen.sum(2).flatten()]
        own, routed = own[on_map.expand_as(own)], routed[seen]
    ends = [F.pad(length.cumsum(0), (1, 0)).int() for length in lengths]
    rows = qkv.reshape(-1, channels)
    q = rows.narrow(1, 0, channels // 3).index_select(0, own.flatten())
    k, v = rows.narrow(1, channels // 3, channels // 3 * 2).index_select(0, routed.flatten()).chunk(2, 1)
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))
    attend = varlen_attn if on_gpu(qkv) else _varlen_on_cpu
    most = -(-height // regions) * -(-width // regions)
    out = attend(q, k, v, *ends, most, routes.shape[2] * most, scale=scale).flatten(1)
    return out.new_zeros(len(rows), out.shape[1]).index_copy(0, own.flatten(), out).reshape(b, height, width, -1)


def _varlen_on_cpu(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_most: int, k_most: int, scale: float) -> Tensor:
    sizes = [ends.diff().tolist() for ends in (q_ends, k_ends, k_ends)]
    sequences = zip(*(x.transpose(0, 1).split(size, 1) for x, size in zip((q, k, v), sizes, strict=True)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*sequence, scale=scale).transpose(0, 1) for sequence in sequences])


def flex_routes(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    """FlexAttention over the regions one after the other, with a block mask made of the routes."""
    x, on_map = _in_regions(qkv, regions)
    b, r, t, _ = x.shape
    q, k, v = x.flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    routed = torch.zeros(b, r, r, dtype=torch.bool, device=routes.device).scatter(2, routes, True)
    size = 64 if t % 64 == 0 else 128
    mask = _block_mask(routed, t, size, None if on_map is None else on_map.flatten())
    out = _flex(q, k, v, None, mask, scale, dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), 64))
    return pasted_heads(out.unflatten(2, (r, t)).transpose(1, 2).flatten(0, 1), regions, qkv)


def _block_mask(routed: Tensor, places: int, size: int, on_map: Tensor | None) -> BlockMask:
    length, needed = places * routed.shape[1], needed_blocks(routed, places, size)[:, None]
    count, order = needed.sum(-1, dtype=torch.int32), needed.int().argsort(dim=-1, descending=True, stable=True).int()

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        pair = routed[b, i // places, j // places]
        return pair if on_map is None else pair & on_map[j]

    whole = places % size == 0 and on_map is None  # a block then is one region's
    blocks = (torch.zeros_like(count), order, count, order) if whole else (count, order)
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=size, mask_mod=seen, seq_lengths=(length, length))


def needed_blocks(routed: Tensor, places: int, size: int) -> Tensor:
    """Which blocks of `size` positions hold a routed pair of regions, (B, r, r), of `places` positions each: (B, blocks, blocks)."""
    block = torch.arange(-(-places * routed.shape[1] // size), device=routed.device)[:, None] * size
    first = torch.arange(routed.shape[1], device=routed.device) * places
    holds = ((first < block + size) & (first + places > block)).to(torch.float32)  # (blocks, r)
    return holds @ routed.float() @ holds.T > 0


def _flex(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Callable | None, mask: BlockMask, scale: float, options: dict | None = None
) -> Tensor:
    if on_gpu(q):
        return torch.compile(flex_attention, dynamic=False, fullgraph=True)(
            q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, kernel_options=options)
    # On the CPU torch's has no gradients. Also here what the blocks leave out is not attended, and of full ones all is.
    scores = q @ k.transpose(-2, -1) * scale
    b, h, i, j = (torch.arange(n).reshape([-1 if axis == at else 1 for at in range(4)]) for axis, n in enumerate(scores.shape))
    partial, full = (_dense(*blocks, mask.BLOCK_SIZE, scores) for blocks in (
        (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)))
    scores = scores if score_mod is None else score_mod(scores, b, h, i, j)
    return scores.masked_fill(~(partial & mask.mask_mod(b, h, i, j) | full), -torch.inf).softmax(-1) @ v


def _dense(count: Tensor | None, order: Tensor | None, size: tuple[int, int], scores: Tensor) -> Tensor:
    if count is None or order is None:
        return torch.zeros((), dtype=torch.bool)
    listed = torch.arange(order.shape[-1]) < count[..., None]
    blocks = torch.zeros_like(listed).scatter(-1, order.long(), listed)
    return blocks.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)[..., : scores.shape[2], : scores.shape[3]]


def masked_sdpa(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    """torch's attention over the whole map, under a mask made of the routes."""
    b, height, width, _ = qkv.shape
    row, column = (torch.arange(n, device=qkv.device) // -(-n // regions) for n in (height, width))
    region = (row[:, None] * regions + column).flatten()
    routed = torch.zeros(b, regions**2, regions**2, dtype=torch.bool, device=routes.device).scatter(2, routes, True)
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, routed[:, None, region][..., region], scale=scale)
    return out.transpose(1, 2).reshape(b, height, width, -1)


def pooled_affinity(q: Tensor, k: Tensor, regions: int, topk: int) -> Tensor:
    """The scores of region routes: means by pooling, a product, top-k. Of maps on which every region begins."""
    size = [-(-n // regions) for n in q.shape[1:3]]
    q, k = (F.avg_pool2d(x.permute(0, 3, 1, 2), size, ceil_mode=True).flatten(2) for x in (q, k))
    return (q.transpose(1, 2) @ k).topk(topk, -1).values


# Halo attention, as layers of maps (B, C, H, W), with the weights of ours.


def timm_halo(layer: HaloAttention) -> HaloAttn:
    """timm's layer with the same weights."""
    theirs = HaloAttn(
        layer.dim, layer.kv.out_channels - layer.q.out_channels, stride=layer.stride, num_heads=layer.num_heads, dim_head=layer.dim_head,
        block_size=layer.block_size, halo_size=layer.halo_size, device=layer.q.weight.device, dtype=layer.q.weight.dtype)
    theirs.load_state_dict(layer.state_dict(), assign=layer.q.weight.is_meta)
    return theirs


def flex_halo(
    x: Tensor, to_q: Tensor, to_kv: Tensor, rel_h: Tensor, rel_w: Tensor, heads: int, block: int, halo: int, mask: BlockMask
) -> Tensor:
    """FlexAttention over the square map in a border of zeros; relative positions are added to the scores."""
    length, offsets = x.shape[2], block + 2 * halo + block - 1
    bordered = length + 2 * halo
    q = F.conv2d(x, to_q).flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
    kv = F.conv2d(F.pad(x, (halo, halo, halo, halo)), to_kv).flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
    k, v = kv.split((q.shape[3], kv.shape[3] - q.shape[3]), 3)
    rows, columns = q @ rel_h[-offsets:].T, q @ rel_w[-offsets:].T

    def relative(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        y = j // bordered - i // length // block * block - i // length % block + block - 1
        z = j % bordered - i % length // block * block - i % length % block + block - 1
        return score + rows[b, h, i, y.clamp(0, offsets - 1)] + columns[b, h, i, z.clamp(0, offsets - 1)]

    out = _flex(q, k, v, relative, mask, q.shape[3] ** -0.5)
    return out.transpose(2, 3).reshape(x.shape[0], -1, length, length)


def halo_mask(length: int, block: int, halo: int, device: str) -> BlockMask:
    """Which keys of the bordered map are in the window of a query's block."""
    bordered = length + 2 * halo

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        y, x = j // bordered - i // length // block * block, j % bordered - i % length // block * block
        return (y >= 0) & (y < block + 2 * halo) & (x >= 0) & (x < block + 2 * halo)

    return create_block_mask(within, None, None, length**2, bordered**2, device=device)


# Pyramid sparse attention, of q, k, v (B, heads, N, d) and levels (B, heads, query blocks, key blocks).


def flex_pyramid(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block_size: tuple[int, int], mask: BlockMask) -> Tensor:
    """FlexAttention over keys and their means, each as many times as it has keys."""
    keys, values = (pyramid(x, levels.shape[3], block_size[1]) for x in (k, v))
    logarithms = counts(k.shape[2], levels.shape[3], block_size[1], k.device).clamp(min=1).log()

    def repeated(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + logarithms[j]

    return _flex(q, keys, values, repeated, mask, q.shape[3] ** -0.5)


def pyramid_mask(levels: Tensor, block_size: tuple[int, int], tokens: int) -> BlockMask:
    """Which keys and means a query reads: those of its blocks' levels."""
    (b, heads, _, blocks), (of_queries, of_keys) = levels.shape, block_size
    rows = [(torch.arange(blocks * (of_keys // level), device=levels.device) // (of_keys // level), level) for level in LEVELS]
    block = torch.cat([places for places, _ in rows])
    own_level = torch.cat([torch.full_like(places, level) for places, level in rows])
    there = counts(tokens, blocks, of_keys, levels.device) > 0

    def read(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (levels[b, h, i // of_queries, block[j]] == own_level[j]) & there[j]

    return create_block_mask(read, b, heads, tokens, len(block), device=str(levels.device))


# Depthwise dynamic convolution, of maps (B, C, H, W), kernels (B, C, 3, 3) and theta (C,), inhibition included.


def _inhibited(weight: Tensor, theta: Tensor) -> Tensor:
    return weight - theta.sigmoid()[:, None, None] * weight.mean((2, 3), keepdim=True)


def grouped(x: Tensor, weight: Tensor, theta: Tensor) -> Tensor:
    """A convolution with a group for every sample and channel."""
    b, c, h, w = x.shape
    kernels = _inhibited(weight, theta).reshape(b * c, 1, 3, 3)
    return F.conv2d(x.reshape(1, b * c, h, w), kernels, padding=1, groups=b * c).reshape(b, c, h, w)


def unfolded(x: Tensor, weight: Tensor, theta: Tensor) -> Tensor:
    """Neighbourhoods side by side, and a product with the kernels."""
    b, c, h, w = x.shape
    neighbours = F.unfold(x, 3, padding=1).reshape(b, c, 9, h * w)
    return torch.einsum("bckp,bck->bcp", neighbours, _inhibited(weight, theta).flatten(2)).reshape(b, c, h, w)


def pool_by_pool(x: Tensor, weights: Tensor) -> Tensor:
    """Token-aware average pooling of (B, H, W, C): a depthwise convolution for every pool."""
    maps, dim = x.permute(0, 3, 1, 2), x.shape[-1]
    box = maps.new_full((dim, 1, 3, 3), 1 / 9)
    pools = [x, *(F.conv2d(maps, box, padding=d, dilation=d, groups=dim).permute(0, 2, 3, 1) for d in range(1, weights.shape[-1]))]
    return sum(pool * weights[..., i : i + 1] for i, pool in enumerate(pools))


# The selective scan.


def position_by_position(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """The recurrence as it is written, in float32."""
    x, steps = u.float(), F.softplus(delta.float() + bias[:, None])
    b, c = (t.float().repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (b, c))
    h, out = x.new_zeros(*u.shape[:2], a.shape[1]), []
    for t in range(u.shape[2]):
        h = (steps[..., t, None] * a).exp() * h + (steps[..., t] * x[..., t])[..., None] * b[..., t]
        out.append((h * c[..., t]).sum(-1))
    return (torch.stack(out, -1) + d[:, None] * x).to(u.dtype)
