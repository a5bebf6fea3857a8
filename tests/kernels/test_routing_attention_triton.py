import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.kernels import default_backend, routing_attention
from zoo.kernels.routing_attention import reference
from zoo.kernels.routing_attention.triton import _Problem
from zoo.kernels.routing_attention.triton import routing_attention as operator
from zoo.layers import BiLevelRoutingAttention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(device, size, regions, topk, *, kv_size=None, widths=(5, 3), heads=2, weighted=False, dtype=torch.float32, seed=0):
    """q, k and v are slices of one tensor where their maps are one, as in a layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    c, e = heads * widths[0], heads * widths[1]
    if kv_size is None:
        q, k, v = draw(1, *size, 2 * c + e).split((c, c, e), -1)
        kv_size = tuple((n + r - 1) // r for n, r in zip(size, regions, strict=True))
    else:
        kv_map = regions[0] * kv_size[0] - 1, regions[1] * kv_size[1]
        q, k, v = draw(1, *size, c), draw(1, *kv_map, c), draw(1, *kv_map, e)
    count = regions[0] * regions[1]
    routes = torch.stack([torch.randperm(count, generator=generator)[:topk] for _ in range(count)])[None].to(device)
    weights = draw(*routes.shape).abs() if weighted else None
    return q, k, v, routes, list(regions), heads, list(kv_size), widths[0] ** -0.5, weights


def run(function, arguments):
    q, k, v, *rest, weights = arguments
    inputs = [x.detach().requires_grad_() for x in (q, k, v, weights) if x is not None]
    out = function(*inputs[:3], *rest, inputs[3] if weights is not None else None)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad(out, inputs, cotangent)


def kernels(*arguments):
    return operator(*arguments)[0]


def agree(arguments):
    """Values and all gradients are those of the definition in float64, to the rounding of the arguments' dtype.

    Where sums cancel, that is no longer small beside them: then the definition in that dtype says how large it may be. A weight's
    gradient, a sum over all queries and keys of two regions, is rounded as its terms are.
    """
    dtype, regions, kv_size = arguments[0].dtype, arguments[4], arguments[6]
    pairs = math.prod(-(-n // r) for n, r in zip(arguments[0].shape[1:3], regions, strict=True)) * math.prod(kv_size)
    exact = run(reference.routing_attention, [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments])
    rounded = run(reference.routing_attention, arguments)
    for place, (ours, theirs, definition) in enumerate(zip(run(kernels, arguments), exact, rounded, strict=True)):
        assert ours.dtype == dtype
        tolerance = 5e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        size = max(1, theirs.abs().max().item(), pairs**0.5 if place == 4 else 0)
        allowed = max(tolerance * size, 4 * (definition.double() - theirs).abs().max().item())
        torch.testing.assert_close(ours.double(), theirs, atol=allowed, rtol=0)


@pytest.mark.parametrize(("name", "packed", "shape"), [
    ("small regions, packed", True, dict(size=(8, 8), regions=(4, 4), topk=6, widths=(32, 32), dtype=torch.bfloat16)),
    ("several tiles of a packed map", True, dict(size=(9, 10), regions=(5, 5), topk=12, heads=1)),
    ("ragged", False, dict(size=(7, 9), regions=(2, 2), topk=2)),
    ("ragged and packed", True, dict(size=(7, 5), regions=(6, 3), topk=9, widths=(16, 20))),
    ("empty regions", True, dict(size=(2, 3), regions=(3, 2), topk=1, heads=1)),
    ("empty regions, not packed", False, dict(size=(9, 5), regions=(1, 4), topk=1, heads=1)),
    ("several tiles of a region", False, dict(size=(13, 18), regions=(2, 1), topk=1, heads=1, dtype=torch.float16)),
    ("other regions of keys", False, dict(size=(8, 6), regions=(2, 1), topk=2, kv_size=(3, 7), heads=1)),
    ("weighted", False, dict(size=(6, 7), regions=(2, 2), topk=3, weighted=True, heads=1)),
    ("weighted, several tiles", False, dict(size=(13, 10), regions=(2, 1), topk=2, weighted=True, heads=1)),
    ("a block of keys", False, dict(size=(8, 16), regions=(1, 2), topk=1, heads=1)),
    ("a position more than a block", False, dict(size=(5, 26), regions=(1, 2), topk=2, heads=1, widths=(16, 16))),
    ("a position less than a block", False, dict(size=(7, 18), regions=(1, 2), topk=1, heads=1)),
    ("several blocks of every route", False, dict(size=(22, 13), regions=(2, 1), topk=2, heads=1, dtype=torch.bfloat16)),
    ("blocks of ragged routes", False, dict(size=(10, 28), regions=(1, 3), topk=2, heads=1)),
    ("blocks of empty routes", False, dict(size=(9, 36), regions=(1, 5), topk=2, heads=1)),
    ("blocks of weighted routes", False, dict(size=(9, 23), regions=(1, 2), topk=2, heads=1, weighted=True)),
    ("blocks of keys, few queries", False, dict(size=(6, 5), regions=(2, 1), topk=1, kv_size=(10, 7), heads=1)),
    ("few keys, blocks of queries", False, dict(size=(10, 14), regions=(1, 2), topk=1, kv_size=(3, 4), heads=1, weighted=True)),
    ("wide heads", False, dict(size=(4, 5), regions=(1, 2), topk=1, widths=(128, 100), heads=1)),
])
def test_values_and_gradients_are_those_of_the_definition(kernel_device, name, packed, shape):
    arguments = problem(kernel_device, **shape)
    assert _Problem(*arguments).packed == packed
    agree(arguments)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), regions=st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]),
    kv_size=st.none() | st.tuples(st.integers(2, 5), st.integers(1, 5)), widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    weighted=st.booleans(), dtype=st.sampled_from(DTYPES), data=st.data(),
)
@settings(max_examples=8)
def test_any_shape(kernel_device, size, regions, kv_size, widths, weighted, dtype, data):
    topk = data.draw(st.integers(1, regions[0] * regions[1]))
    agree(problem(kernel_device, size, regions, topk, kv_size=kv_size, widths=widths, heads=1, weighted=weighted, dtype=dtype))


def test_any_memory_layout(kernel_device):
    q, k, v, *rest = problem(kernel_device, (6, 4), (2, 1), 1, heads=1)
    agree((q.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), k.transpose(1, 2).contiguous().transpose(1, 2), v, *rest))


def test_very_low_scores_beside_positions_off_the_map(kernel_device):
    q = torch.full((1, 3, 3, 4), -10.0, device=kernel_device)
    v = torch.randn_like(q)
    arguments = q, -q, v, torch.zeros(1, 4, 1, dtype=torch.int64, device=kernel_device) + 3, [2, 2], 1, [2, 2], 1.0, None
    torch.testing.assert_close(run(kernels, arguments)[0], v[:, 2:, 2:].expand_as(v))


@pytest.mark.parametrize("size", [(3, 4), (8, 17)])
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(kernel_device, size, scale):
    q, k, v, routes, regions, heads, kv_size, _, weights = problem(kernel_device, size, (1, 2), 2, heads=1)
    agree((q, k, v, routes, regions, heads, kv_size, scale, weights))


PACKED, SMALL, WALKED = ((6, 4), True), ((9, 8), False), ((24, 16), False)  # maps of 3 × 2 regions


@pytest.mark.parametrize(("size", "packed", "value", "place"), [
    *((*PACKED, value, place) for value in (torch.nan, torch.inf) for place in range(4)),
    *((*size, torch.nan, place) for size in (SMALL, WALKED) for place in (0, 2)),
])
def test_what_is_broken_reaches_only_what_is_routed_to_it(kernel_device, size, packed, value, place):
    """Of q, k, v and the gradient from above. The last region attends to itself and to region 1, nobody else attends to it."""
    regions = 3, 2
    routes = torch.tensor([[[0, 2], [1, 0], [2, 1], [3, 4], [0, 4], [5, 1]]], device=kernel_device)
    h, w = size[0] // regions[0], size[1] // regions[1]
    own = torch.ones(1, *size, 16, dtype=torch.bool, device=kernel_device)
    own[:, -h:, -w:] = False
    of_keys = own.clone()
    of_keys[:, :h, -w:] = False
    results = []
    for broken in (False, True):
        maps = list(torch.randn(4, 1, *size, 16, generator=torch.Generator().manual_seed(0)).to(kernel_device).unbind())
        if broken:
            maps[place][0, -1, -1, 3] = value
        *maps, above = maps
        arguments = *(x.requires_grad_() for x in maps), routes, list(regions), 1, [h, w], 0.25, None
        assert _Problem(*arguments).packed == packed
        out = kernels(*arguments)
        gradients = torch.autograd.grad(out, arguments[:3], above)
        results.append((out[own], gradients[0][own], gradients[1][of_keys], gradients[2][of_keys]))
        assert not broken or not all(x[:, -h:, -w:].isfinite().all() for x in (out, *gradients))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("size", "regions", "packed"), [((6, 6), (3, 3), True), ((12, 8), (3, 2), False), ((24, 16), (3, 2), False)])
def test_what_is_no_region_is_left_out_and_no_memory_beyond_is_touched(kernel_device, size, regions, packed):
    q, k, v, routes, regions, heads, kv_size, scale, _ = problem(kernel_device, size, regions, 1, heads=1, widths=(8, 8))
    count = routes.shape[1]
    wrong = torch.cat([routes, routes.new_tensor([-1, count, -(2**40), 2**32 + 1]).expand(1, count, 4)], 2)
    assert _Problem(q, k, v, wrong, regions, heads, kv_size, scale, None).packed == packed
    results = [run(kernels, (q, k, v, given, regions, heads, kv_size, scale, None)) for given in (routes, wrong)]
    torch.testing.assert_close(*results)


def test_packed_regions_given_twice_count_once(kernel_device):
    q, k, v, _, regions, heads, kv_size, scale, _ = problem(kernel_device, (6, 6), (3, 3), 1, heads=1)
    once = torch.tensor([2, 5, 6, 7], device=kernel_device).expand(1, 9, 4)
    twice = torch.cat([once, once[..., 1:]], 2)
    assert all(_Problem(q, k, v, routes, regions, heads, kv_size, scale, None).packed for routes in (once, twice))
    torch.testing.assert_close(*(run(kernels, (q, k, v, routes, regions, heads, kv_size, scale, None)) for routes in (once, twice)))


def test_is_deterministic(kernel_device):
    arguments = problem(kernel_device, (9, 8), (2, 2), 2, weighted=True, heads=1, dtype=torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(run(kernels, arguments), run(kernels, arguments), strict=True))


def test_operator_is_well_registered(kernel_device):
    q, k, v, *rest, weights = problem(kernel_device, (4, 3), (1, 2), 1, heads=1, weighted=True)
    torch.library.opcheck(operator, (*(x.detach().requires_grad_() for x in (q, k, v)), *rest, weights.requires_grad_()))


def test_compiles_whole(kernel_device):
    q, k, v, routes, regions, heads, *_ = problem(kernel_device, (4, 3), (1, 2), 1, heads=1)
    q = q.detach().requires_grad_()

    def attention(q):
        return routing_attention(q, k, v, routes, regions, heads, backend="triton")

    out, expected = torch.compile(attention, fullgraph=True, backend="aot_eager")(q), attention(q)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q), torch.autograd.grad(expected.sum(), q))


class Called(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_layers_use_the_kernels_on_cuda():
    with FakeTensorMode(), torch.device("cuda"), Called() as called:
        layer = BiLevelRoutingAttention(32, num_heads=2, regions=2, topk=2, soft_routing=True)
        x = torch.empty(1, 8, 8, 32)
        layer(x)
        with torch.autocast("cuda", torch.bfloat16):
            layer(x)
    assert called.names.count("zoo::region_means_triton") == 4
    assert called.names.count("zoo::routing_attention_triton") == 2


def test_layer_under_autocast_and_checkpointing(kernel_device):
    """Trains the same with its kernels as without them."""
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(16, num_heads=1, regions=2, topk=2, soft_routing=True).to(kernel_device)
    x = torch.randn(1, 5, 6, 16).to(kernel_device)
    results = []
    for backend in ("triton", "reference"):
        layer.zero_grad()
        with default_backend(backend), torch.autocast(kernel_device, torch.bfloat16):
            out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            out.float().square().sum().backward()
        results.append((out, *(parameter.grad for parameter in layer.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.03 * theirs.abs().max().item(), rtol=0)


def test_what_the_kernels_cannot_do_is_named(kernel_device):
    x, routes = torch.zeros(1, 4, 4, 160, device=kernel_device), torch.zeros(1, 4, 1, dtype=torch.int64, device=kernel_device)
    with pytest.raises(ValueError, match="routing_attention: backend 'triton' cannot run here: .* at most 128 channels, not 160"):
        routing_attention(x, x, x, routes, (2, 2), 1, backend="triton")
    with torch.autocast(kernel_device, torch.float16), pytest.raises(ValueError, match="one dtype, not .* and torch.float16"):
        routing_attention(x, x, x.half(), routes, (2, 2), 2, backend="triton")
    with pytest.raises(ValueError, match="at most 1048576 positions, not 4194304"):
        routing_attention(x, x, x, routes, (2, 2), 2, kv_size=(2048, 2048), backend="triton")
