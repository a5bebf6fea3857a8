import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import region_routes, routing_attention
from zoo.kernels.routing_attention import blocked, dense, reference

FORMULATIONS = {"reference": reference, "dense": dense, "blocked": blocked}


def oracle(q, k, v, routes, regions, num_heads, kv_size, scale, weights=None):
    """The definition, a loop over queries: the keys of the routed regions that lie on the map, one softmax per head."""
    b, height, width, _ = q.shape
    h, w = math.ceil(height / regions[0]), math.ceil(width / regions[1])
    out = torch.zeros(b, height, width, v.shape[-1], dtype=v.dtype)
    for n in range(b):
        for i in range(height):
            for j in range(width):
                keys, values = [], []
                for rank, region in enumerate(routes[n, i // h * regions[1] + j // w].tolist()):
                    row, column = region // regions[1] * kv_size[0], region % regions[1] * kv_size[1]
                    factor = 1 if weights is None else weights[n, i // h * regions[1] + j // w, rank]
                    for x, parts in ((k, keys), (v, values)):
                        parts.append(factor * x[n, row : row + kv_size[0], column : column + kv_size[1]].flatten(0, 1))
                keys, values = (torch.cat(parts).unflatten(1, (num_heads, -1)) for parts in (keys, values))
                if len(keys):
                    scores = torch.einsum("hd,shd->hs", q[n, i, j].unflatten(0, (num_heads, -1)), keys) * scale
                    out[n, i, j] = torch.einsum("hs,she->he", scores.softmax(-1), values).flatten()
    return out


def problem(size, regions, topk, kv_size=None, channels=(4, 6), heads=2, weighted=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    kv_map = size if kv_size is None else (regions[0] * kv_size[0] - 1, regions[1] * kv_size[1])
    kv_size = kv_size or tuple(math.ceil(n / r) for n, r in zip(size, regions, strict=True))
    q, k, v = draw(2, *size, channels[0]), draw(2, *kv_map, channels[0]), draw(2, *kv_map, channels[1])
    routes = torch.stack([torch.randperm(regions[0] * regions[1], generator=generator)[:topk] for _ in range(2 * regions[0] * regions[1])])
    routes = routes.reshape(2, regions[0] * regions[1], topk)
    weights = draw(*routes.shape).detach().abs().requires_grad_() if weighted else None
    return (q, k, v, routes, regions, heads, kv_size, 0.7, weights)


PROBLEMS = {
    "even": dict(size=(6, 6), regions=(3, 3), topk=2),
    "ragged": dict(size=(7, 5), regions=(3, 2), topk=3),
    "empty regions": dict(size=(3, 4), regions=(7, 5), topk=20),
    "one position": dict(size=(1, 1), regions=(2, 2), topk=4),
    "one region": dict(size=(5, 3), regions=(1, 1), topk=1),
    "pooled keys": dict(size=(8, 6), regions=(2, 3), topk=2, kv_size=(2, 1)),
    "weighted": dict(size=(7, 6), regions=(3, 3), topk=4, weighted=True),
}


def run(formulation, arguments):
    *arguments, weights = arguments
    inputs = [x for x in (*arguments[:3], weights) if x is not None]
    out = FORMULATIONS[formulation].routing_attention(*arguments, weights)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, cotangent)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_formulation_is_the_definition(name, formulation, monkeypatch):
    monkeypatch.setitem(blocked.SCORES_AT_ONCE, "cpu", 50)  # several blocks, the last one incomplete
    arguments = problem(**PROBLEMS[name])
    if formulation == "dense" and arguments[-1] is not None:
        pytest.skip("the dense formulation takes no weights; dispatch never gives it any")
    inputs = [x for x in (*arguments[:3], arguments[-1]) if x is not None]
    expected = oracle(*arguments)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = expected, *torch.autograd.grad(expected, inputs, cotangent, materialize_grads=True)
    torch.testing.assert_close(run(formulation, arguments), expected)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_in_float64(name):
    *arguments, weights = problem(**PROBLEMS[name])
    q, k, v, *rest = arguments
    inputs = [q, k, v] if weights is None else [q, k, v, weights]

    def attention(q, k, v, weights=None):
        return blocked.routing_attention(q, k, v, *rest, weights)

    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), regions=st.tuples(st.integers(1, 4), st.integers(1, 4)), data=st.data(),
    heads=st.integers(1, 3), seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_public_function_agrees_with_the_definition_on_any_shape(size, regions, data, heads, seed):
    topk = data.draw(st.integers(1, regions[0] * regions[1]))
    weighted = data.draw(st.booleans())
    q, k, v, routes, *_, weights = arguments = problem(size, regions, topk, None, (2 * heads, 3 * heads), heads, weighted, seed=seed)
    out = routing_attention(q, k, v, routes, regions, heads, scale=0.7, weights=weights)
    torch.testing.assert_close(out, oracle(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_lower_precision(formulation, dtype):
    arguments = problem((14, 10), (7, 5), 4, channels=(32, 32), dtype=dtype)
    exact = tuple(x.detach().double().requires_grad_() if torch.is_tensor(x) and x.requires_grad else x for x in arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for ours, theirs in zip(run(formulation, arguments), run("reference", exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * theirs.detach().abs().max().item(), rtol=0)


def test_attention_over_all_regions_is_ordinary_attention():
    q, k, v = torch.randn(3, 2, 6, 9, 8).unbind()
    routes, _ = region_routes(q, k, (3, 3), 9)
    heads = [x.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 6, 9, 8)
    torch.testing.assert_close(routing_attention(q, k, v, routes, (3, 3), 2), expected)


def test_regions_routed_only_to_empty_ones_give_zero():
    q = torch.randn(1, 2, 2, 4)
    routes = torch.full((1, 9, 1), 8)  # on a 2×2 map only four of the 3×3 regions hold anything
    for formulation in FORMULATIONS.values():
        out = formulation.routing_attention(q, q, q, routes, (3, 3), 2, (1, 1), 0.5, None)
        torch.testing.assert_close(out, torch.zeros_like(q))


def test_very_low_scores_beside_positions_off_the_map():
    """Off the map keys are zero and so would be their scores: far above the others, and beyond what exp holds."""
    q = torch.full((1, 3, 3, 4), -10.0, requires_grad=True)
    k, v = torch.full_like(q, 10.0).requires_grad_(), torch.randn_like(q).requires_grad_()
    routes, _ = region_routes(q, k, (2, 2), 4)
    out = blocked.routing_attention(q, k, v, routes, (2, 2), 1, (2, 2), 1.0, None)
    torch.testing.assert_close(out, v.mean((1, 2), keepdim=True).expand_as(out))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_dispatch_avoids_the_dense_mask_where_regions_are_many(monkeypatch):
    called = []
    for name, formulation in FORMULATIONS.items():
        monkeypatch.setattr(formulation, "routing_attention", lambda q, *_, name=name: called.append(name) or q)
    for side, topk in ((14, 16), (28, 4), (56, 1), (8, 1)):
        x = torch.zeros(1, side, side, 32)
        routing_attention(x, x, x, torch.arange(topk).expand(1, 49, topk), (7, 7), 1)
    assert called == ["dense", "blocked", "blocked", "dense"]


def test_memory_does_not_grow_with_topk():
    """The largest tensor that forward and backward make, seen by a dispatch mode, is no copy of the routed keys."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
            return out

    q, k, v, routes, regions, heads, kv_size, scale, _ = problem((56, 56), (7, 7), 12, channels=(64, 64), dtype=torch.float32)
    with Largest() as largest:
        blocked.routing_attention(q, k, v, routes, regions, heads, kv_size, scale, None).sum().backward()
    assert largest.elements <= max(blocked.SCORES_AT_ONCE["cpu"] * 2, q.numel())
    with Largest() as largest:
        reference.routing_attention(q, k, v, routes, regions, heads, kv_size, scale, None)
    assert largest.elements >= 12 * k.numel()  # the check can fail


def test_operator_is_well_registered():
    for name in ("even", "ragged", "weighted"):
        q, k, v, routes, regions, heads, kv_size, scale, weights = problem(**PROBLEMS[name])
        torch.library.opcheck(blocked._forward, (q, k, v, routes, list(regions), heads, list(kv_size), scale, weights))


@pytest.mark.parametrize("name", ["ragged", "weighted"])
def test_compiles_whole(name):
    q, k, v, *rest = problem(**PROBLEMS[name], dtype=torch.float32)
    compiled = torch.compile(blocked.routing_attention, fullgraph=True, backend="aot_eager")
    out, expected = compiled(q, k, v, *rest), blocked.routing_attention(q, k, v, *rest)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), k), torch.autograd.grad(expected.sum(), k))


@pytest.mark.parametrize("backend", [None, *FORMULATIONS, "triton"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", range(3), ids="qkv")
def test_what_is_broken_reaches_only_what_is_routed_to_it(kernel_device, backend, value, place):
    """Of 3 × 2 regions of 2 × 2 positions, the last attends to itself and nobody else does."""
    generator = torch.Generator().manual_seed(0)
    routes = torch.tensor([[[0, 2], [1, 0], [2, 1], [3, 4], [0, 4], [5, 1]]], device=kernel_device)
    results = []
    for broken in (False, True):
        generator.manual_seed(0)
        maps = [torch.randn(1, 6, 4, 4, generator=generator).to(kernel_device) for _ in range(3)]
        if broken:
            maps[place][0, 5, 3, 1] = value
        maps = [x.requires_grad_() for x in maps]
        out = routing_attention(*maps, routes, (3, 2), 1, backend=backend)
        elsewhere = torch.ones_like(out, dtype=torch.bool)
        elsewhere[:, 4:, 2:] = False  # region 5
        cotangent = torch.where(elsewhere, torch.randn(out.shape, generator=generator).to(kernel_device), 0)
        of_keys = elsewhere.clone()
        of_keys[:, :2, 2:] = False  # region 1, to which region 5 is routed beside itself
        gradients = torch.autograd.grad(out, maps, cotangent)
        assert not broken or not out[:, 4:, 2:].isfinite().all()
        results.append((out[elsewhere], gradients[0][elsewhere], gradients[1][of_keys], gradients[2][of_keys]))
    torch.testing.assert_close(*results)


WRONG = {
    "no tensor": ("q", lambda q: 3, "q must be a tensor"),
    "three dimensions": ("v", lambda v: v[0], r"v must be \(B, H, W, C\)"),
    "whole numbers": ("k", lambda k: k.long(), "k must be of a floating dtype"),
    "no positions": ("q", lambda q: q[:, :0], r"q must be \(B, H, W, C\), of which B alone may be 0"),
    "no channels": ("v", lambda v: v[..., :0], r"v must be \(B, H, W, C\), of which B alone may be 0"),
    "another dtype": ("v", lambda v: v.half(), r"v must have the dtype of q \(torch.float32\), got torch.float16"),
    "another batch": ("k", lambda k: k[:1], "must share the batch"),
    "another map": ("v", lambda v: v[:, :-1], "k and v the map"),
    "other channels": ("k", lambda k: k[..., :2], "k must have the channels of q"),
    "another device": ("k", lambda k: k.to("meta"), "k must be on the device of q"),
    "routes elsewhere": ("routes", lambda routes: routes.to("meta"), "routes must be on the device of q"),
    "short routes": ("routes", lambda routes: routes.int(), "routes must be a tensor of int64, got torch.int32"),
    "routes of no batch": ("routes", lambda routes: routes[0], r"routes must be \(B, rows·columns, n\)"),
    "routes of fewer regions": ("routes", lambda routes: routes[:, 1:], r"routes must be \(B, rows·columns, n\)"),
    "no routes": ("routes", lambda routes: routes[..., :0], r"routes must be \(B, rows·columns, n\)"),
    "a negative route": ("routes", lambda routes: routes - 1, r"routes must be 0 to 5 \(the regions\), got -1"),
    "a route beyond": ("routes", lambda routes: routes + 5, r"routes must be 0 to 5 \(the regions\), got 6"),
    "a route twice": ("routes", lambda routes: routes * 0 + 2, "routes must have no region twice for the same region, got 2 again"),
    "no heads": ("num_heads", lambda _: 0, "num_heads must be at least 1, got 0"),
    "fewer than no heads": ("num_heads", lambda _: -2, "num_heads must be at least 1, got -2"),
    "half a head": ("num_heads", lambda _: 0.5, "num_heads must be whole, got 0.5"),
    "heads that do not divide": ("num_heads", lambda _: 3, r"num_heads must divide the channels of q \(4\), got 3"),
    "one number of regions": ("regions", lambda _: 6, "regions must be a pair, for rows and columns, got 6"),
    "three numbers of regions": ("regions", lambda _: (3, 2, 1), r"regions must be a pair, .* got \(3, 2, 1\)"),
    "no regions": ("regions", lambda _: (0, 6), "regions must be at least 1, got 0"),
    "empty regions of keys": ("kv_size", lambda _: (2, 0), "kv_size must be at least 1, got 0"),
    "regions of keys of one side": ("kv_size", lambda _: 2, "kv_size must be a pair, .* got 2"),
    "too few rows of keys": ("kv_size", lambda _: (1, 9), r"k must have at most 3×18 positions, \(3, 2\) regions of \(1, 9\), got 6×4"),
    "too few columns of keys": ("kv_size", lambda _: (9, 1), r"k must have at most 27×2 positions, .* got 6×4"),
    "no number": ("scale", lambda _: torch.nan, "scale must be finite, got nan"),
    "infinity": ("scale", lambda _: -torch.inf, "scale must be finite, got -inf"),
    "a word": ("scale", lambda _: "1", "scale must be a number or None, got '1'"),
    "weights of other shape": ("weights", lambda weights: weights[..., :1], "weights must have the shape of routes"),
    "whole weights": ("weights", lambda weights: weights.long(), "weights must be of a floating dtype, .* got torch.int64"),
    "one weight": ("weights", lambda _: 1.0, "weights must be a tensor .* got float"),
    "weights elsewhere": ("weights", lambda weights: weights.to("meta"), "weights must be on the device of q"),
}


@given(name=st.sampled_from(sorted(WRONG)), backend=st.sampled_from([None, *FORMULATIONS, "triton"]), weighted=st.booleans())
@settings(max_examples=80)
def test_wrong_arguments_end_in_one_sentence_on_every_backend(name, backend, weighted):
    changed, change, sentence = WRONG[name]
    q, k, v = torch.randn(3, 2, 6, 4, 4).unbind()
    arguments = dict(q=q, k=k, v=v, routes=torch.tensor([0, 1]).expand(2, 6, 2), regions=(3, 2), num_heads=2, kv_size=(2, 2), scale=1.0)
    if weighted or changed == "weights":
        arguments["weights"] = torch.ones(2, 6, 2)
        backend = "blocked" if backend == "dense" else backend  # which takes no weights
    routing_attention(**arguments, backend=backend)
    with pytest.raises((ValueError, TypeError), match=f"^routing_attention: [^\n]*{sentence}[^\n]*$"):
        routing_attention(**arguments | {changed: change(arguments.get(changed))}, backend=backend)


def test_key_maps_beyond_their_regions_are_refused():
    q, routes = torch.randn(1, 8, 8, 4), torch.arange(2).expand(1, 4, 2)
    for size, kv_size in (((9, 8), (4, 4)), ((4, 5), (2, 2))):
        k = torch.randn(1, *size, 4)
        with pytest.raises(ValueError, match=f"got {size[0]}×{size[1]}"):
            routing_attention(q, k, k, routes, (2, 2), 1, kv_size)


def test_routes_of_compiled_calls_are_checked_when_they_run():
    q = torch.randn(2, 40, 40, 4)
    attention = torch.compile(lambda routes: routing_attention(q, q, q, routes, (4, 4), 1), fullgraph=True, backend="aot_eager")
    attention(torch.arange(2).expand(2, 16, 2))
    for wrong in (torch.full((2, 16, 2), -1), torch.ones(2, 16, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="routes must"):
            attention(wrong)


def test_bad_input_is_named():
    x, routes = torch.zeros(1, 4, 4, 6), torch.zeros(1, 4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_heads must divide the channels of q \(6\), got 4"):
        routing_attention(x, x, x, routes, (2, 2), 4)
    with pytest.raises(ValueError, match=r"routes must be .*\(1, 9, n\), got \(1, 4, 2\)"):
        routing_attention(x, x, x, routes, (3, 3), 2)
    with pytest.raises(ValueError, match="k must have the channels of q"):
        routing_attention(x, x[..., :4], x, routes, (2, 2), 2)
    with pytest.raises(ValueError, match="k and v the map"):
        routing_attention(x, x, x[:, :2], routes, (2, 2), 2)
    with pytest.raises(ValueError, match="weights must have the shape of routes"):
        routing_attention(x, x, x, routes, (2, 2), 2, weights=torch.ones(1, 4, 1))
