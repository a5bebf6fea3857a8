"""What operators and layers keep for the backward pass, by formula and as autograd says, into benchmarks/kernels_memory.md.

Beside each, what the authors' formulation keeps (of halo attention timm's, of deformable convolutions torchvision's). Parameters, which
are there anyway, do not count; every piece of memory counts once, however many tensors lie in it.
"""
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo import kernels, layers
from zoo.files import replacing
from zoo.kernels._launch import recording

from . import attnet_authors, biformer_authors, das_torchvision, kernel_rivals, litv2_authors
from .kernel_model import _Flash, modelled

FILE = Path(__file__).with_name("kernels_memory.md")
SYMBOLS = {
    "s": "bytes of a number", "B": "images", "P": "positions of all images", "O": "output positions of all images", "C": "channels",
    "D": "output channels", "h": "hidden channels", "g": "channels of a gating signal", "m": "heads", "r": "regions, or groups of channels",
    "n": "routed regions, or states of a channel", "t": "positions of a region, or tokens of an image", "b": "side of a block",
    "w": "side of a window", "K": "pools",
}


class Kept(NamedTuple):
    """Something that keeps memory: its formula in bytes of SYMBOLS, and how to run it on a device, small or not."""

    name: str
    side: str
    formula: str
    build: Callable[[str, bool], tuple[Callable[[], Tensor], dict[str, int], nn.Module | None]]

    def bytes(self, sizes: dict[str, int], device: str) -> int:
        return round(eval(self.formula, {}, sizes | dict(s=_dtype(device).itemsize)))


def _dtype(device: str) -> torch.dtype:
    """On the CPU, where some operators know no other and norms keep statistics in it, float32."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def _leaf(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(_dtype(device)).requires_grad_()


def _layer(build: Callable[[], nn.Module], channels_first: bool, small: bool, device: str, **sizes: int) -> tuple:
    batch, side, dim = (2, 14, sizes["C"]) if small else (64, 56, sizes["C"])
    layer = build().to(device, _dtype(device)).train()
    x = _leaf(device, *((batch, dim, side, side) if channels_first else (batch, side, side, dim)))
    regions = dict(t=side**2 // sizes["r"]) if "r" in sizes else {}
    return functools.partial(layer, x), dict(B=batch, P=batch * side**2, O=batch * side**2) | regions | sizes, layer


Formulation = tuple[str, Callable[[], nn.Module]]


def _of_layers(name: str, ours: Formulation, theirs: Formulation | None, channels_first: bool, **sizes: int) -> list[Kept]:
    """`ours` and `theirs`: formula, and what builds the layer."""
    return [Kept(name, side, given[0], lambda device, small, build=given[1]: _layer(build, channels_first, small, device, **sizes))
            for side, given in (("ours", ours), ("authors", theirs)) if given is not None]


def _routing(function: Callable[..., Tensor]) -> Callable[[str, bool], tuple]:
    def build(device: str, small: bool) -> tuple:
        batch, side, regions, topk = (2, 12, 3, 2) if small else (64, 56, 7, 4)
        routes = torch.arange(topk, device=device).expand(batch, regions**2, topk).contiguous()
        run = functools.partial(function, _leaf(device, batch, side, side, 192), routes=routes, regions=regions, heads=2, scale=0.1)
        sizes = dict(B=batch, P=batch * side**2, C=64, m=2, r=regions**2, n=topk, t=side**2 // regions**2)
        return run, sizes, None

    return build


def _routed(qkv: Tensor, routes: Tensor, regions: int, heads: int, scale: float) -> Tensor:
    return kernels.routing_attention(*qkv.chunk(3, -1), routes, (regions, regions), heads, scale=scale)


def _affinities(function: Callable[..., Tensor]) -> Callable[[str, bool], tuple]:
    def build(device: str, small: bool) -> tuple:
        batch, side, regions, topk = (2, 12, 3, 2) if small else (64, 56, 7, 4)
        q, k = (_leaf(device, batch, side, side, 64) for _ in range(2))
        sizes = dict(B=batch, P=batch * side**2, C=64, r=regions**2, n=topk)
        return functools.partial(function, q, k, regions=regions, topk=topk), sizes, None

    return build


def _routes(q: Tensor, k: Tensor, regions: int, topk: int) -> Tensor:
    return kernels.region_routes(q, k, (regions, regions), topk)[1]


def _dynamic(function: Callable[..., Tensor]) -> Callable[[str, bool], tuple]:
    def build(device: str, small: bool) -> tuple:
        batch, side, dim = (2, 6, 8) if small else (64, 56, 64)
        leaves = _leaf(device, batch, dim, side, side), _leaf(device, batch, dim, 3, 3), _leaf(device, dim)
        return functools.partial(function, *leaves), dict(B=batch, P=batch * side**2, C=dim), None

    return build


def _pooled(function: Callable[..., Tensor]) -> Callable[[str, bool], tuple]:
    def build(device: str, small: bool) -> tuple:
        batch, side, dim, pools = (2, 6, 8, 3) if small else (64, 14, 448, 4)
        leaves = _leaf(device, batch, side, side, dim), _leaf(device, batch, side, side, pools)
        return functools.partial(function, *leaves), dict(B=batch, P=batch * side**2, C=dim, K=pools), None

    return build


def _deformed(function: Callable[..., Tensor]) -> Callable[[str, bool], tuple]:
    def build(device: str, small: bool) -> tuple:
        batch, side, dim, out = (2, 6, 4, 6) if small else (32, 50, 256, 256)
        leaves = (_leaf(device, batch, dim, side, side), _leaf(device, batch, 18, side, side), _leaf(device, out, dim, 3, 3),
                  _leaf(device, batch, 9, side, side))
        return functools.partial(function, *leaves), dict(B=batch, P=batch * side**2, C=dim, D=out, O=batch * side**2), None

    return build


def _modulated(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return kernels.deform_conv2d(x, offset, weight, None, 1, 1, 1, mask)


def _torchvisions(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """In float32, as it has no bfloat16."""
    from torchvision.ops import deform_conv2d
    return deform_conv2d(x.float(), offset.float(), weight.float(), None, 1, 1, 1, mask.float()).to(x.dtype)


def _heads(function: Callable[..., Tensor], tensors: int) -> Callable[[str, bool], tuple]:
    """Of so many tensors (B, heads, N, d)."""
    def build(device: str, small: bool) -> tuple:
        batch, heads, tokens, dim = (2, 3, 20, 4) if small else (16, 6, 785, 64)
        leaves = [_leaf(device, batch, heads, tokens, dim) for _ in range(tensors)]
        return functools.partial(function, *leaves), dict(B=batch, P=batch * tokens, C=heads * dim, m=heads, t=tokens), None

    return build


def _scanned(device: str, small: bool) -> tuple:
    """As SS2D has it, channels innermost; of a chunk of 64 positions one state is kept."""
    batch, dim, states, groups, tokens = (2, 8, 3, 2, 128) if small else (16, 768, 16, 4, 4096)
    u, delta = (_leaf(device, batch, tokens, dim).detach().transpose(1, 2).requires_grad_() for _ in range(2))
    b, c = (_leaf(device, batch, tokens, groups, states).detach().permute(0, 2, 3, 1).requires_grad_() for _ in range(2))
    a, d, bias = (torch.randn(shape, device=device).requires_grad_() for shape in ((dim, states), (dim,), (dim,)))
    scan = functools.partial(kernels.selective_scan, u, delta, a, b, c, d, bias, delta_softplus=True)
    return scan, dict(B=batch, P=batch * tokens, C=dim, n=states, r=groups, t=tokens), None


def _entmax(device: str, small: bool) -> tuple:
    batch, heads, tokens = (2, 3, 20) if small else (16, 6, 785)
    scores = _leaf(device, batch, heads, tokens, tokens)
    return functools.partial(kernels.entmax, scores), dict(P=batch * tokens, m=heads, t=tokens), None


def _gate(build: Callable[[int, int], nn.Module]) -> Callable[[str, bool], tuple]:
    def both(device: str, small: bool) -> tuple:
        batch, side, dim, gate_dim = (2, 6, 8, 12) if small else (16, 112, 64, 128)
        x, g = _leaf(device, batch, dim, side, side), _leaf(device, batch, gate_dim, side // 2, side // 2)
        layer = build(dim, gate_dim).to(device, _dtype(device)).train()
        return functools.partial(layer, x, g), dict(P=batch * side**2, C=dim, g=gate_dim), layer

    return both


def _das() -> nn.Module:
    layer = layers.DAS(64)
    layer.__class__ = das_torchvision.TorchvisionDAS
    return layer


def _halo() -> layers.HaloAttention:
    return layers.HaloAttention(64, num_heads=4, block_size=7, halo_size=3)


ROUTING, HALO = dict(C=64, m=2, r=49, n=4), dict(C=64, m=4, b=7, w=13)
EVERYTHING = [
    Kept("routing_attention", "ours", "s*4*P*C + 4*P*m + 8*B*r*n", _routing(_routed)),
    Kept("routing_attention", "authors", "s*(P*C + 2*n*P*C + n*P*t*m) + 8*B*r*n", _routing(kernel_rivals.gathered)),
    Kept("region_routes", "ours", "s*(2*B*r*C + B*r*n) + 8*B*r*n", _affinities(_routes)),
    Kept("region_routes", "authors", "s*(2*P*C + 2*B*r*C) + 8*B*r*n", _affinities(kernel_rivals.pooled_affinity)),
    Kept("deform_conv2d, modulated", "ours", "s*(P*C + 18*O + 9*C*D + 9*O)", _deformed(_modulated)),
    Kept("deform_conv2d, modulated", "torchvision", "4*(P*C + 18*O + 9*C*D + 9*O + D)", _deformed(_torchvisions)),
    Kept("depthwise_dynamic_conv2d", "ours", "s*(P*C + 9*B*C + C)", _dynamic(kernels.depthwise_dynamic_conv2d)),
    Kept("depthwise_dynamic_conv2d", "authors", "s*(P*C + 9*B*C + B*C + C)", _dynamic(kernel_rivals.grouped)),
    Kept("token_aware_avg_pool", "ours", "s*(P*C + P*K)", _pooled(kernels.token_aware_avg_pool)),
    Kept("token_aware_avg_pool", "authors", "s*(P*C*K + P*K + 9*C)", _pooled(kernel_rivals.pool_by_pool)),
    Kept("selective_scan", "ours", "s*(2*P*C + 2*P*r*n) + 4*(P/64*n*C + n*C + 2*C)", _scanned),
    Kept("attention_similarity", "ours", "s*2*P*C + 4*2*P", _heads(kernels.attention_similarity, 2)),
    Kept("attention_similarity", "all at once", "4*(2*P*C + P*m*t + 3*P*t + 5*P) + P*t + P",
         _heads(functools.partial(kernels.attention_similarity, backend="reference"), 2)),
    Kept("attention_cross_entropy", "ours", "s*4*P*C", _heads(kernels.attention_cross_entropy, 4)),
    Kept("entmax", "ours", "s*P*m*t", _entmax),
    *_of_layers(
        "BiLevelRoutingAttention",
        ("s*6*P*C + 4*P*m + 8*B*r*n", lambda: layers.BiLevelRoutingAttention(64, 2, regions=7, topk=4)),
        ("s*(6*P*C + 2*n*P*C + n*P*t*m) + 8*B*r*n", lambda: biformer_authors.GatheredRoutingAttention(64, 2, 7, 4)), False, **ROUTING),
    *_of_layers(
        "HaloAttention", ("s*5*P*C + 4*P*m", _halo),
        ("s*(4*P*C + 2*P*C*w**2/b**2 + P*m*w**2)", lambda: kernel_rivals.timm_halo(_halo())), True, **HALO),
    *_of_layers(
        "HiLoAttention", ("s*5*P*C + 4*P*m", lambda: layers.HiLoAttention(64, 8, window=2, alpha=0.5)),
        ("s*(5.5*P*C + P*m/2*4 + P*m/2*t/4)", lambda: litv2_authors.HiLo(64, 8, 2, 0.5)), False, C=64, m=8, r=1),
    *_of_layers(
        "ATConv", ("s*(3*P*C + 4*9*B*C + 9*t)", lambda: layers.ATConv(64)),
        ("s*(4*P*C + 3*9*B*C + B*C + C)", lambda: attnet_authors.AttentiveConv(64)), True, C=64, r=1),
    *_of_layers(
        "DAS", ("s*(4*P*C + 3*P*h + 18*P + 2*B*h) + 4*2*P", lambda: layers.DAS(64)),
        ("s*(4*P*C + 3*P*h + 18*P + B) + 4*(2*P + 2*B*h)", _das), True, C=64, h=12),
    *_of_layers("TokenAwareAvgPool", ("s*(P*C + 3*P*K) + 4*2*K", lambda: layers.TokenAwareAvgPool(64)), None, False, C=64, K=4),
    *_of_layers(
        "PolarizedSelfAttention", ("s*(2*P*C + 3*P + 5*B*C)", lambda: layers.PolarizedSelfAttention(64)), None, True, C=64),
    *_of_layers("SelectiveKernelUnit", ("s*(5*P*C + 4*B*C) + 4*5*C", lambda: layers.SelectiveKernelUnit(64)), None, True, C=64),
    *_of_layers(
        "DeformableTokenMerging", ("s*(P*C + 8*P/4 + 2*P/4*D) + 4*2*D", lambda: layers.DeformableTokenMerging(64)), None, True,
        C=64, D=128),
    Kept("AttentionGate", "ours", "s*(3*P*C + P/4*(C + g) + 5*P/4) + 4*2*C", _gate(layers.AttentionGate)),
    Kept("MultiAttentionGate", "ours", "s*(9*P*C + P/4*(2*C + g) + 5*P/2) + 4*6*C", _gate(layers.MultiAttentionGate)),
    *_of_layers("TokenMixing", ("s*5*P*C + 4*P*m", lambda: layers.TokenMixing(64, 2)), None, False, C=64, m=2),
    *_of_layers("ChannelProcessing", ("s*(6*P*C + P*m + 2*B*C + 6*P*h) + 4*(2*h + 2*P)", lambda: layers.ChannelProcessing(64, 2, 256)),
                None, False, C=64, m=2, h=256),
    *_of_layers("FullyAttentionalBlock", ("s*(15*P*C + P*m + 2*B*C + 6*P*h) + 4*(P*m + 6*P + 2*h)",
                                          lambda: layers.FullyAttentionalBlock(64, 2)), None, False, C=64, m=2, h=256),
    *_of_layers("ContextBroadcast", ("0", lambda: layers.ContextBroadcast(64)), None, False, C=64),
]


def measured(run: Callable[[], Tensor], layer: nn.Module | None, launching: bool = False) -> int:
    """Bytes that autograd keeps of a call, those of parameters and buffers left out. Kernels need not run for it."""
    storages = {}
    own = {x.untyped_storage()._cdata for x in (*layer.parameters(), *layer.buffers())} if layer else set()

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), recording(launching=launching):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def page() -> str:
    symbols = ", ".join(f"{symbol} {meaning}" for symbol, meaning in SYMBOLS.items())
    lines = ["# What is kept for the backward pass", "", f"Written by `python -m benchmarks.kernel_memory`. "
             f"{' '.join((__doc__ or '').replace(', into benchmarks/kernels_memory.md', '').split())}", "",
             f"The symbols: {symbols}. MiB are of bfloat16.", "",
             "| | side | formula, bytes | sizes | MiB by formula | MiB measured | ours / theirs |",
             "| --- | --- | --- | --- | ---: | ---: | ---: |"]
    taken = {}
    with modelled(), _Flash():
        for one in EVERYTHING:
            run, sizes, layer = one.build("meta", False)
            bytes_kept = taken[one.name, one.side] = measured(run, layer)
            ratio = f"{taken[one.name, 'ours'] / bytes_kept:.2f}" if one.side != "ours" else ""
            formula, shown = one.formula.replace("**2", "²").replace("*", "·"), ", ".join(f"{name} {size}" for name, size in sizes.items())
            numbers = f"{one.bytes(sizes, 'meta') / 2**20:.1f} | {bytes_kept / 2**20:.1f}"
            lines.append(f"| {one.name} | {one.side} | {formula} | {shown} | {numbers} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with replacing(FILE) as written:
        written.write_text(page())
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
