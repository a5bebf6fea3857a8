import math

import pytest
import torch
import torch.nn.functional as F

from zoo.layers import BiLevelRoutingAttention

OPTIONS = {
    "default": {},
    "rectangular grid": dict(regions=(2, 5), topk=3),
    "narrow queries": dict(qk_dim=4),
    "no projection, no bias, no convolution": dict(out_proj=False, qkv_bias=False, lepe_kernel=0),
    "adaptive average": dict(kv_pool="adaptive_avg", kv_pool_size=2),
    "adaptive maximum": dict(kv_pool="adaptive_max", kv_pool_size=2),
    "average": dict(kv_pool="avg", kv_pool_size=2),
    "maximum": dict(kv_pool="max", kv_pool_size=2),
    "soft": dict(soft_routing=True),
    "soft, differentiable": dict(soft_routing=True, differentiable_routing=True),
    "learned": dict(soft_routing=True, differentiable_routing=True, learned_routing=True),
    "unmasked padding": dict(mask_padding=False),
}
SIZES = [(12, 12), (10, 7), (3, 2), (1, 1)]


def layer(**options):
    torch.manual_seed(0)
    made = BiLevelRoutingAttention(8, 2, **dict(dict(regions=3, topk=2), **options)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def pooled(part, kind, size, full):
    """(h, w, C) → the pooled positions whose window holds any of `part`; windows are those of a region of size `full`."""
    if kind == "identity":
        return part.flatten(0, 1)
    reduce = (lambda x: x.mean((0, 1))) if kind.endswith("avg") else (lambda x: x.amax((0, 1)))
    sides = []
    for n in full:
        if kind.startswith("adaptive"):
            sides.append([(i * n // size, -(-(i + 1) * n // size)) for i in range(size)])
        else:
            step = min(size, n)
            sides.append([(i * step, (i + 1) * step) for i in range(n // step)])
    windows = [part[a:b, c:d] for a, b in sides[0] for c, d in sides[1]]
    return torch.stack([reduce(window) for window in windows if window.numel()])


def oracle(m, x):
    """The layer's definition, a loop over images and regions."""
    height, width = x.shape[1:3]
    rows, columns = m.regions
    if not m.mask_padding:
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    h, w = math.ceil(x.shape[1] / rows), math.ceil(x.shape[2] / columns)
    q, k, v = m.qkv(x).split((m.qk_dim, m.qk_dim, m.dim), -1)
    out = torch.zeros_like(v)
    places = [(slice(i * h, (i + 1) * h), slice(j * w, (j + 1) * w)) for i in range(rows) for j in range(columns)]
    places = [place for place in places if x[0][place].numel()]
    for n in range(len(x)):
        means = [torch.stack([y[n][place].flatten(0, 1).mean(0) for place in places]) for y in (q, k)]
        if m.router is not None:
            means = [m.router(mean) for mean in means]
        affinity = means[0] @ means[1].T
        topk = min(m.topk, len(places))
        for i, place in enumerate(places):
            best = affinity[i].topk(topk)
            weights = (best.values * m.scale).softmax(-1) if m.soft_routing else torch.ones(topk)
            if not m.differentiable_routing:
                weights = weights.detach()
            chosen = list(zip(best.indices.tolist(), weights, strict=True))
            parts = [[pooled(y[n][places[r]], m.kv_pool, m.kv_pool_size, (h, w)) * weight for r, weight in chosen] for y in (k, v)]
            keys, values = (torch.cat(part).unflatten(1, (m.num_heads, -1)) for part in parts)
            queries = q[n][place].unflatten(2, (m.num_heads, -1))
            attention = (torch.einsum("hwmd,smd->hwms", queries, keys) * m.scale).softmax(-1)
            out[n][place] = torch.einsum("hwms,sme->hwme", attention, values).flatten(2)
    if m.lepe is not None:
        out = out + m.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return m.proj(out[:, :height, :width])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_layer_is_its_definition(name, size):
    m = layer(**OPTIONS[name])
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *m.parameters()]
    out, expected = m(x), oracle(m, x)
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, materialize_grads=True) for y in (out, expected))
    torch.testing.assert_close(*grads)


def test_learned_routing_learns_and_hard_routing_passes_no_gradient():
    x = torch.randn(1, 12, 12, 8, dtype=torch.float64)
    m = layer(**OPTIONS["learned"])
    m(x).square().sum().backward()
    assert m.router.weight.grad.abs().sum() > 0
    soft, through = (layer(**OPTIONS[name]) for name in ("soft", "soft, differentiable"))
    grads = [torch.autograd.grad(m(x).square().sum(), m.qkv.weight)[0] for m in (soft, through)]
    assert not torch.allclose(*grads)


def test_masked_padding_cannot_be_seen():
    """On a map that the grid does not divide, region by region the same as on a map that it divides."""
    m = layer(regions=3, topk=9, lepe_kernel=0)
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    every_key = layer(regions=1, topk=1, lepe_kernel=0)
    torch.testing.assert_close(m(x), every_key(x))  # all regions routed: ordinary attention over the 64 positions
    unmasked = layer(regions=3, topk=9, lepe_kernel=0, mask_padding=False)
    assert not torch.allclose(unmasked(x), every_key(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    m = layer(topk=9)  # all regions: of two about as good ones, rounding may pick the other
    x = torch.randn(2, 10, 7, 8, dtype=torch.float64)
    out = m.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and out.shape == x.shape
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out.double(), m.double()(x), atol=tolerance, rtol=tolerance)


def test_memory_layouts():
    m = layer().float()
    x = torch.randn(2, 10, 7, 8)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(m(channels_first), m(x))
    torch.testing.assert_close(m(x.repeat_interleave(2, 0)[::2]), m(x))


@pytest.mark.parametrize("name", ["default", "learned", "adaptive average", "unmasked padding"])
def test_compiles_whole(name):
    m = layer(**OPTIONS[name]).float()
    x = torch.randn(2, 10, 7, 8)
    torch.testing.assert_close(torch.compile(m, fullgraph=True)(x), m(x))


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if "kv_pool" not in options])
def test_exports_with_any_size(name):
    m = layer(**OPTIONS[name]).float().eval()
    dims = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    example = (torch.randn(2, 12, 12, 8),)  # the grid divides it, as it does 224×224: the graph must not rely on that
    exported = torch.export.export(m, example, dynamic_shapes=(dims,), prefer_deferred_runtime_asserts_over_guards=True).module()
    for shape in ((1, 12, 12, 8), (3, 5, 6, 8), (2, 10, 7, 8)):  # torch takes lengths of one, of regions too, for constants
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), m(x))


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if "kv_pool" in options])
def test_pooled_keys_export_with_one_size(name):
    m, x = layer(**OPTIONS[name]).float().eval(), torch.randn(2, 10, 7, 8)
    torch.testing.assert_close(torch.export.export(m, (x,)).module()(x), m(x))
    with pytest.raises(Exception, match="fixed size only"):
        torch.export.export(m, (x,), dynamic_shapes=(dict.fromkeys((1, 2), torch.export.Dim.DYNAMIC),))
    with pytest.raises(ValueError, match="fixed size only"), torch.no_grad():
        torch.jit.trace(m, x)


def test_state_survives_saving(tmp_path):
    m = layer(**OPTIONS["learned"])
    torch.save(m.state_dict(), tmp_path / "layer.pth")
    other = BiLevelRoutingAttention(8, 2, regions=3, topk=2, **OPTIONS["learned"]).double()
    other.load_state_dict(torch.load(tmp_path / "layer.pth", weights_only=True))
    x = torch.randn(1, 5, 9, 8, dtype=torch.float64)
    assert torch.equal(m(x), other(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), r"num_heads must divide dim \(8\) and qk_dim \(8\), got 3"),
        (dict(topk=10), r"topk must be 1 to 9 .*got 10"),
        (dict(lepe_kernel=4), "lepe_kernel must be odd"),
        (dict(kv_pool="conv"), "kv_pool must be one of identity, avg, .*got 'conv'"),
        (dict(kv_pool_size=0), "kv_pool_size must be at least 1, got 0"),
        (dict(regions=0), "regions must be at least 1"),
        (dict(differentiable_routing=True), "needs soft_routing"),
        (dict(learned_routing=True), "needs differentiable_routing"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(8, **dict(dict(num_heads=2, regions=3), **options))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 8\), got shape \(2, 8, 5, 5\)"):
        layer()(torch.zeros(2, 8, 5, 5))
