import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import region_means, region_routes
from zoo.kernels.region_routes.triton import region_means as operator
from zoo.kernels.region_routes.triton import region_routes as routes_operator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def means_and_gradient(x, regions, backend):
    x = x.detach().requires_grad_()
    means = region_means(x, regions, backend)
    return means, *torch.autograd.grad(means.square().sum(), x)


@given(
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)), regions=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 70), dtype=st.sampled_from(DTYPES), layout=st.permutations(range(4)), seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_means_and_gradients_are_those_of_the_reference(kernel_device, size, regions, channels, dtype, layout, seed):
    x = torch.randn(2, *size, channels, generator=torch.Generator().manual_seed(seed)).to(kernel_device)
    strided = x.to(dtype).permute(layout).contiguous().permute([layout.index(i) for i in range(4)])
    expected = means_and_gradient(strided.float(), regions, "reference")
    for ours, theirs in zip(means_and_gradient(strided, regions, "triton"), expected, strict=True):
        assert ours.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.float(), theirs, atol=tolerance, rtol=tolerance)


def routes_and_gradients(q, k, regions, topk, backend):
    q, k = (x.detach().requires_grad_() for x in (q, k))
    routes, scores = region_routes(q, k, regions, topk, backend)
    weights = torch.linspace(1, 2, scores.numel(), device=q.device, dtype=q.dtype).view_as(scores)
    return routes, scores, *torch.autograd.grad((scores.masked_fill(scores.isinf(), 0) * weights).sum(), (q, k))


@given(
    sizes=st.tuples(*[st.tuples(st.integers(1, 13), st.integers(1, 13))] * 2), regions=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 70), data=st.data(), seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_routes_and_gradients_are_those_of_the_reference(kernel_device, sizes, regions, channels, data, seed):
    topk = data.draw(st.integers(1, regions[0] * regions[1]))
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, *size, channels, generator=generator).to(kernel_device) for size in sizes)
    (routes, *found), (expected_routes, *expected) = (routes_and_gradients(q, k, regions, topk, name) for name in ("triton", "reference"))
    equal = expected[0].isinf() | (expected[0] == 0)  # of or to a region off the map: any order is right
    assert torch.equal(routes.masked_fill(equal, 0), expected_routes.masked_fill(equal, 0))
    assert (routes.sort(-1).values.diff() > 0).all(), "a region was chosen twice"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@given(dtype=st.sampled_from(DTYPES[1:]), seed=st.integers(0, 99))
@settings(max_examples=4)
def test_half_precision_chooses_by_affinities_of_float32(kernel_device, dtype, seed):
    q, k = torch.randn(2, 1, 9, 8, 33, generator=torch.Generator().manual_seed(seed)).to(kernel_device, dtype).unbind()
    routes, scores = region_routes(q, k, (5, 4), 5, "triton")
    affinity = torch.matmul(*(x.float() for x in (region_means(q, (5, 4), "triton"), region_means(k, (5, 4), "triton").mT)))
    torch.testing.assert_close(affinity.gather(2, routes), affinity.sort(descending=True).values[..., :5], atol=1e-5, rtol=1e-5)
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.float(), affinity.gather(2, routes), atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_equal_and_undefined_affinities_are_routes_still(kernel_device):
    zeros = torch.zeros(1, 6, 6, 4, device=kernel_device)
    assert torch.equal(region_routes(zeros, zeros, (3, 3), 9, "triton")[0][0], torch.arange(9, device=kernel_device).expand(9, -1))
    broken = zeros.clone()
    broken[0, 0, 5] = torch.nan
    routes, scores = region_routes(torch.ones_like(zeros), broken, (3, 3), 4, "triton")
    assert (routes[0, :, 0] == 2).all() and scores[0, :, 0].isnan().all()
    assert torch.equal(routes[0, :, 1:], torch.tensor([0, 1, 3], device=kernel_device).expand(9, -1))


def test_as_many_regions_as_registers_hold(kernel_device):
    q, k = torch.randn(2, 1, 16, 16, 5, device=kernel_device).unbind()
    for ours, theirs in zip(*(region_routes(q, k, (16, 16), 3, backend) for backend in ("triton", "reference")), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="the kernel takes at most 256 regions, not 272"):
        region_routes(q, k, (17, 16), 3, "triton")


def test_operator_is_well_registered(kernel_device):
    torch.library.opcheck(operator, (torch.randn(2, 5, 7, 3, device=kernel_device, requires_grad=True), [2, 3]))
    means = [torch.randn(2, 6, 3, device=kernel_device, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(routes_operator, (*means, [5, 7], [2, 3], 4))


def test_compiles_whole(kernel_device):
    x = torch.randn(1, 5, 7, 3, device=kernel_device, requires_grad=True)
    compiled = torch.compile(lambda x: region_means(x, (2, 3), "triton"), fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), region_means(x, (2, 3), "triton")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(expected.square().sum(), x))
    routed = torch.compile(lambda x: region_routes(x, x, (2, 3), 2, "triton"), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(routed(x), region_routes(x, x, (2, 3), 2, "triton"), strict=True):
        torch.testing.assert_close(ours, theirs)
