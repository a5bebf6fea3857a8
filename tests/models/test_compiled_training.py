"""`torch.compile` around whole networks in training: one graph forward, one backward, whatever backend the operators have."""
import contextlib

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import zoo
from zoo.kernels._launch import recording


@pytest.mark.long
@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize(("name", "operator"), [
    ("biformer_nano", "routing_attention"), ("litv2_nano", "deform_conv2d"), ("halonet_nano", "halo_attention")])
def test_training_is_one_graph_forward_and_one_backward(name, operator, backend, monkeypatch):
    torch.manual_seed(0)
    model, images, graphs = timm.create_model(name, num_classes=5).train(), torch.randn(2, 3, 32, 32), []

    def noted(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph)

    def step(network):
        loss = network(images).square().sum()
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=noted, bw_compiler=noted))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launches = recording() if backend else contextlib.nullcontext()  # kernels take minutes in the interpreter; their tests are others
    with zoo.kernels.default_backend(backend), launches:
        found = step(compiled)
    assert len(graphs) == 2
    if backend is None:
        for ours, plain in zip(found, step(model), strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * (1 + plain.abs().max().item()))
    else:
        assert all(any(target.startswith(f"zoo.{operator}_triton") for target in graph) for graph in graphs)
