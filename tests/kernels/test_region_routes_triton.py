import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import region_means, region_routes
from zoo.kernels.region_routes.triton import region_means as operator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def means_and_gradient(x, regions, backend):
    x = x.detach().requires_grad_()
    means = region_means(x, regions, backend)
    return means, *torch.autograd.grad(means.square().sum(), x)


@given(
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)), regions=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 70), dtype=st.sampled_from(DTYPES), layout=st.permutations(range(4)), seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_means_and_gradients_are_those_of_the_reference(kernel_device, size, regions, channels, dtype, layout, seed):
    x = torch.randn(2, *size, channels, generator=torch.Generator().manual_seed(seed)).to(kernel_device)
    strided = x.to(dtype).permute(layout).contiguous().permute([layout.index(i) for i in range(4)])
    expected = means_and_gradient(strided.float(), regions, "reference")
    for ours, theirs in zip(means_and_gradient(strided, regions, "triton"), expected, strict=True):
        assert ours.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.float(), theirs, atol=tolerance, rtol=tolerance)


def test_routes_are_those_of_the_reference(kernel_device):
    q, k = torch.randn(2, 2, 9, 17, 6, device=kernel_device).unbind()
    for ours, theirs in zip(*(region_routes(q, k, (4, 3), 5, backend) for backend in ("triton", "reference")), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operator_is_well_registered(kernel_device):
    torch.library.opcheck(operator, (torch.randn(2, 5, 7, 3, device=kernel_device, requires_grad=True), [2, 3]))


def test_compiles_whole(kernel_device):
    x = torch.randn(1, 5, 7, 3, device=kernel_device, requires_grad=True)
    compiled = torch.compile(lambda x: region_means(x, (2, 3), "triton"), fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), region_means(x, (2, 3), "triton")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(expected.square().sum(), x))
