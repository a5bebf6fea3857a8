"""CUDA graphs capture every operator, forward and backward: nothing waits for the device, and nothing is made elsewhere."""
import importlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import kernels
from zoo.kernels import _backends
from zoo.kernels._launch import recording

ROUTES = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 2]]).expand(1, 4, 2)

OPERATORS = {  # of tensors and routes, and the tensors' shapes
    "routing_attention": (lambda routes, *qkv: kernels.routing_attention(*qkv, routes, (2, 2), 2, backend="triton"), [(1, 16, 16, 32)] * 3),
    "routing_attention, packed": (
        lambda routes, *qkv: kernels.routing_attention(*qkv, routes, (2, 2), 2, backend="triton"), [(1, 3, 4, 32)] * 3),
    "routing_attention, weighted": (
        lambda routes, q, k, v, w: kernels.routing_attention(q, k, v, routes, (2, 2), 2, weights=w, backend="triton"),
        [(1, 16, 16, 32)] * 3 + [(1, 4, 2)]),
    "pyramid_sparse_attention": (
        lambda routes, *qkv: kernels.pyramid_sparse_attention(*qkv, routes[:, None, :, :1].expand(1, 2, 4, 3), (16, 32), backend="triton"),
        [(1, 2, 50, 16), *[(1, 2, 70, 16)] * 2]),
    "region_means": (lambda _, x: kernels.region_means(x, (2, 3), "triton"), [(1, 3, 4, 2)]),
    "region_routes": (lambda _, q, k: kernels.region_routes(q, k, (2, 3), 2, "triton")[1], [(1, 3, 7, 16), (1, 4, 5, 16)]),
    "halo_attention": (lambda _, *x: kernels.halo_attention(*x, 4, 1, backend="triton"), [(1, 7, 8, 2, 16)] * 3 + [(9, 16)] * 2),
    "halo_attention, channels first": (
        lambda _, q, k, v, *tables: kernels.halo_attention(*(x.permute(0, 3, 4, 1, 2) for x in (q, k, v)), *tables, 4, 1, backend="triton"),
        [(1, 2, 16, 7, 8)] * 3 + [(9, 16)] * 2),
    "deform_conv2d": (lambda _, x, o, w, b, m: kernels.deform_conv2d(x, o, w, b, 1, 1, 1, m, "triton"),
                      [(1, 2, 3, 4), (1, 18, 3, 4), (3, 2, 3, 3), (3,), (1, 9, 3, 4)]),
    "deform_conv2d, strided": (lambda _, x, o, w: kernels.deform_conv2d(x[:, :, ::2], o, w, None, 1, 1, backend="triton"),
                               [(1, 4, 6, 4), (1, 36, 3, 4), (2, 2, 3, 3)]),
    "depthwise_dynamic_conv2d": (lambda _, x, k, t: kernels.depthwise_dynamic_conv2d(x, k, t, "triton"),
                                 [(1, 2, 3, 4), (1, 2, 3, 3), (2,)]),
    "selective_scan": (lambda _, *x: kernels.selective_scan(*x, delta_softplus=True, backend="triton"),
                       [(1, 6, 5), (1, 6, 5), (6, 3), (1, 2, 3, 5), (1, 2, 3, 5), (6,), (6,)]),
    "token_aware_avg_pool": (lambda _, x, w: kernels.token_aware_avg_pool(x, w, "triton"), [(1, 3, 4, 2), (1, 3, 4, 3)]),
}


class Strict(TorchDispatchMode):
    """Refuses what waits for the device or would leave its stream, and tensors of another device than `device`."""

    WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount",
               "unique_consecutive", "repeat_interleave", "record_stream")

    def __init__(self, device):
        super().__init__()
        self.allowed, self.seen = torch.device(device), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen.append(name)
        assert name not in self.WAITING, f"{function} waits for the device"
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            assert not isinstance(x, torch.Tensor) or x.device == self.allowed, f"{function} makes a tensor on {x.device}"
        return out


def test_every_operator_with_kernels_is_here():
    assert {name.partition(",")[0] for name in OPERATORS} - {"region_means"} == set(_backends.operators_with_kernels())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_waits_or_leaves_the_device(name, dtype, deterministic, monkeypatch):
    """As seen from PyTorch: tensors are without values, on a device that there need not be, and launches are noted only."""
    for operator in _backends.operators_with_kernels():
        importlib.import_module(f"zoo.kernels.{operator}.triton")
    for module in [module for path, module in sys.modules.items() if path.startswith("zoo.kernels")]:
        if hasattr(module, "observed"):  # as where no mode looks on, though one does
            monkeypatch.setattr(module, "observed", lambda arguments: False)
    monkeypatch.setattr(_backends, "obstacle", lambda device, dtype: None)
    run, shapes = OPERATORS[name]
    torch.use_deterministic_algorithms(deterministic)
    try:
        with recording("sm_90") as launches, Strict("meta") as strict:
            leaves = [torch.empty(shape, device="meta", dtype=dtype).requires_grad_() for shape in shapes]
            out = run(torch.empty(ROUTES.shape, device="meta", dtype=torch.int64), *leaves)
            gradients = torch.autograd.grad(out, leaves, torch.empty_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]
    assert len({launch.name for launch in launches}) >= 1 and not any("triton" in name for name in strict.seen)


def test_what_waits_is_seen():
    with Strict("meta"), pytest.raises(AssertionError, match="waits for the device"):
        torch.empty(3, device="meta").nonzero()
    with Strict("cpu"), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(3).sum().item()
    with Strict("meta"), pytest.raises(AssertionError, match="on cpu"):
        torch.zeros(3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_graphs_replay_forward_and_backward(name):
    run, shapes = OPERATORS[name]
    leaves, routes = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes], ROUTES.cuda()

    def both():
        out = run(routes, *leaves)
        return out, *torch.autograd.grad(out, leaves, cotangent)

    cotangent = torch.randn_like(run(routes, *leaves))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for seed in (1, 2):
        with torch.no_grad():
            for x in (*leaves, cotangent):
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close([x.clone() for x in captured], list(both()), atol=1e-4, rtol=1e-4)  # deform_conv2d adds in any order
