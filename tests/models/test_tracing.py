"""Graphs of models: recorded once, by torch's tracers, they hold for other batches and sizes."""
import functools
import pickle

import pytest
import timm
import torch
from shallow import SHALLOW
from timm.models import create_feature_extractor, get_notrace_functions, get_notrace_modules
from torch import nn
from torch.export import Dim
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor
from torchvision.models.feature_extraction import get_graph_node_names

import zoo
from zoo import layers

DENSE = ("attention_unet_nano", "attention_unet3d_nano", "inspyrenet_nano", "msinet_nano", "attention_unet_litv2_nano", "dconnnet_nano",
         "sum_nano", "a2n_nano_x2", "han_nano_x2")
LIGHT = [name for name in zoo.list_models("*_nano*") if not zoo.models.is_dense(name)]
SIZES = ((96, 128), (75, 101), (131, 70))
families = pytest.mark.parametrize("name", [*LIGHT, *DENSE])


def make(name: str, **args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **args).eval()


def images(model: nn.Module, size: tuple[int, int], batch: int) -> torch.Tensor:
    """Of this size, or for volumes an eighth of it and of its height."""
    if getattr(model, "spatial_dims", 2) == 3:
        size = tuple(n // 8 for n in (*size, size[0]))
    return torch.randn(batch, getattr(model, "in_chans", 3), *size, generator=torch.Generator().manual_seed(1))


def check(graph, model: nn.Module, sizes=SIZES) -> None:
    """That the graph computes what the model does, for several batches and sizes."""
    with torch.no_grad():
        for batch, size in zip((3, 1, 2), sizes, strict=True):
            x = images(model, size, batch)
            expected = model(x)
            assert (graph(x) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), (batch, size)


@families
def test_torch_jit_trace(name):
    model = make(name)
    with torch.no_grad():
        graph = torch.jit.trace(model, images(model, (75, 50), 1), check_trace=False)
    check(graph, model)


@pytest.mark.parametrize("name", ["litv2_nano", "attention_unet_nano"])
def test_torch_jit_trace_where_windows_and_levels_divide(name):
    model = make(name)
    with torch.no_grad():
        graph = torch.jit.trace(model, images(model, (64, 64), 2), check_trace=False)
    check(graph, model)


@pytest.mark.parametrize(("name", "size"), [
    *((name, (250, 203)) for name in (*LIGHT, *DENSE) if name not in ("attention_unet_litv2_nano", "inspyrenet_nano")),
    ("litv2_nano", (256, 192)), ("halonet_nano", (256, 192))], ids=str)
def test_torch_export_with_free_sizes(name, size):
    """Traced at sizes that windows and blocks divide, and at sizes that they do not. torch takes lengths of one for constants."""
    model = make(name, **SHALLOW.get(name, {}))
    x = images(model, size, 2)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(dict.fromkeys((0, *range(2, x.ndim)), Dim.DYNAMIC),))
        check(program.module(), model, ((192, 256), (201, 133), (163, 224)))


@families
def test_torch_export_with_named_and_bounded_sizes(name):
    """Where maps hold more than one position, HaloNet's more than one block and BiFormer's regions more than one.

    torch takes lengths of one for constants. Of networks that cut their maps it cannot prove for all sizes what holds for each, and is told
    to ask as they come.
    """
    cuts = name.startswith(("biformer", "halonet", "litv2", "moh", "vidat", "attention_unet_litv2", "inspyrenet"))
    model = make(name, **SHALLOW.get(name, {}))
    x = images(model, (250, 203), 2)
    sizes = {dim: Dim(f"size{dim}", min=16, max=512) if x.ndim == 5 else Dim(f"size{dim}", min=113, max=1024) for dim in range(2, x.ndim)}
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)} | sizes,),
                                      prefer_deferred_runtime_asserts_over_guards=cuts)
        check(program.module(), model, ((192, 256), (201, 133), (163, 224)))


def extracted(model: nn.Module, mode: str = "eval") -> nn.Module:
    """The model's own output from a graph that torch.fx made of it."""
    options = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
    nodes = dict(zip(("train", "eval"), get_graph_node_names(model, tracer_kwargs=options), strict=True))
    last = {f"{each}_return_nodes": {(nodes[mode] if nodes[mode][-1] in own else own)[-1]: "out"} for each, own in nodes.items()}
    return torchvision_extractor(model, **last, tracer_kwargs=options)


@families
def test_torch_fx(name):
    model = make(name)
    graph = extracted(model)
    check(lambda x: graph(x)["out"], model)
    x = images(model, (64, 32), 2)
    again = pickle.loads(pickle.dumps(graph)).eval()  # torchvision's graphs come back in training mode
    assert torch.equal(again(x)["out"], graph(x)["out"])
    own, traced = dict(model.named_parameters()), dict(graph.named_parameters())  # in the order of their use
    expected = torch.autograd.grad(model(x).square().sum(), list(own.values()), materialize_grads=True)
    used = [name for name in own if name in traced]  # of what the logits do not need, as iFAM's part logits, nothing is in the graph
    found = torch.autograd.grad(graph(x)["out"].square().sum(), [traced[path] for path in used], materialize_grads=True)
    torch.testing.assert_close(found, tuple(grad for name, grad in zip(own, expected, strict=True) if name in used))
    assert not any(grad.any() for name, grad in zip(own, expected, strict=True) if name not in used)


@pytest.mark.parametrize("name", LIGHT)
def test_features_by_torch_fx(name):
    model = make(name)
    modules = [info["module"] for info in model.feature_info]
    x = images(model, (64, 96), 1)
    with torch.no_grad():
        expected = []
        hooks = [model.get_submodule(module).register_forward_hook(lambda *call: expected.append(call[2])) for module in modules]
        model(x)
        for hook in hooks:
            hook.remove()
        present = [module for module in modules if module != "coarser"]  # FAN's, which is a feature and not on the way to the output
        found = create_feature_extractor(model, {module: module for module in present})(x)
        for module, value in zip(present, expected, strict=True):  # graphs hold plain linear layers
            torch.testing.assert_close(found[module], value)


class GivenTokens(nn.Module):
    """A mechanism that takes tokens beside queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.layer = layers.MixtureOfHeadAttention(2, 8, 16)

    def forward(self, q, k, v):
        return self.layer(q, k, v, None, None, 0.0, q.transpose(1, 2).flatten(2))


LAYERS = {
    "MixtureOfHeadAttention": (GivenTokens, *[(1, 2, 5, 8)] * 3),
    "ContextBroadcast": (functools.partial(layers.ContextBroadcast, 16), (1, 5, 6, 16)),
    "ChannelProcessing": (functools.partial(layers.ChannelProcessing, 16, 2, 32), (1, 5, 6, 16)),
    "FullyAttentionalBlock": (functools.partial(layers.FullyAttentionalBlock, 16, 2, num_scales=3), (1, 5, 6, 16)),
    "TokenMixing": (functools.partial(layers.TokenMixing, 16, 2), (1, 5, 6, 16)),
    "BiLevelRoutingAttention": (functools.partial(layers.BiLevelRoutingAttention, 16, 2, 2, 2), (1, 5, 6, 16)),
    "HiLoAttention": (functools.partial(layers.HiLoAttention, 16, 2), (1, 5, 6, 16)),
    "SelectiveScan2d": (functools.partial(layers.SelectiveScan2d, 16, 4), (1, 5, 6, 16)),
    "TokenAwareAvgPool": (functools.partial(layers.TokenAwareAvgPool, 16), (1, 5, 6, 16)),
    "AggregatedAttention": (functools.partial(layers.AggregatedAttention, 16, 2, 2), (1, 5, 6, 16)),
    "LengthScaledAttention": (functools.partial(layers.LengthScaledAttention, 16, 2), (1, 5, 6, 16)),
    "MixtureOfHeads": (functools.partial(layers.MixtureOfHeads, 16, 4, 1, 2), (1, 5, 16)),
    "PartDiscovery": (functools.partial(layers.PartDiscovery, 16, 3), (1, 5, 6, 16)),
    "EfficientProbing": (functools.partial(layers.EfficientProbing, 16, 4), (1, 5, 16)),
    "SimPool": (functools.partial(layers.SimPool, 16), (1, 5, 16)),
    "SelfAttention": (functools.partial(layers.SelfAttention, 16, 2, "entmax15", "head"), (1, 5, 16)),
    "NormalizedAttention": (functools.partial(layers.NormalizedAttention, 2, 8, "cog"), *[(1, 2, 5, 8)] * 3),
    "MultipleInstanceHead": (functools.partial(layers.MultipleInstanceHead, 16, 2, 8, 2), (5, 16)),
    "HedgehogAttention": (functools.partial(layers.HedgehogAttention, 2, 8), *[(1, 2, 5, 8)] * 3),
    "SparsifinerAttention": (functools.partial(layers.SparsifinerAttention, 2, 8, (2, 2)), *[(1, 2, 5, 8)] * 3),
    "DualAttention": (functools.partial(layers.DualAttention, 16, 1, 1), *[(1, 5, 16)] * 2),
    "RelationalAttention": (functools.partial(layers.RelationalAttention, 16, 2, activation="relu"), *[(1, 5, 16)] * 2),
    "SymbolicAttention": (functools.partial(layers.SymbolicAttention, 16), (1, 5, 16)),
    "ScaleInvariantContextAttention": (
        functools.partial(layers.ScaleInvariantContextAttention, 16, 8, (4, 6)), (1, 16, 5, 6), (1, 1, 3, 3)),
    "PyramidSparseAttention": (functools.partial(layers.PyramidSparseAttention, 2, 8, (4, 5), 1, (8, 8)), *[(1, 2, 21, 8)] * 3),
    "LayerAttention": (layers.LayerAttention, (1, 3, 16, 5, 6)),
    **{name: (functools.partial(getattr(layers, name), 16), (1, 16, 5, 6)) for name in (
        "DAS", "ATConv", "AttentionInAttention", "ChannelSpatialAttention", "AxialAttention", "DeformableTokenMerging", "HaloAttention",
        "PolarizedSelfAttention", "PyramidAxialAttention", "SelectiveKernelUnit")},
    **{name: (functools.partial(getattr(layers, name), 16, 8), (1, 16, 5, 6), (1, 8, 3, 3)) for name in (
        "AttentionGate", "MultiAttentionGate")},
}


@pytest.mark.parametrize("name", [name for name in layers.__all__ if isinstance(getattr(layers, name), type)])
def test_every_layer_is_traced_by_torch_fx_where_it_is_a_part(name):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = build()

        def forward(self, x):
            return self.layer(2 * x)

    class PartOfTwo(Part):
        def forward(self, x, signal):
            return self.layer(2 * x, signal)

    class PartOfThree(Part):
        def forward(self, q, k, v):
            return self.layer(2 * q, k, v)

    build, *shapes = LAYERS[name]
    model, inputs = (Part, PartOfTwo, PartOfThree)[len(shapes) - 1]().eval(), [torch.randn(shape) for shape in shapes]
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda module, path: isinstance(module, tuple(get_notrace_modules())) or torch.fx.Tracer.is_leaf_module(
        tracer, module, path)
    graph = torch.fx.GraphModule(model, tracer.trace(model, {}))
    torch.testing.assert_close(graph(*inputs), model(*inputs))


@families
def test_compiled_graphs_are_few(name):
    """Of several sizes and batches: about as many as of a ResNet, of which it makes three; torch gives up at the ninth."""
    cases = ((65, 70), 3), ((96, 64), 2), ((224, 224), 3), ((33, 47), 2), ((81, 81), 3), ((128, 160), 2), ((72, 112), 3), ((112, 112), 1)
    model, graphs = make(name, **SHALLOW.get(name, {})), 0

    def counting(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)
    with torch.no_grad():
        for size, batch in cases:
            x = images(model, size, batch)
            expected = model(x)
            assert (compiled(x) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), (batch, size)
    torch._dynamo.reset()
    assert graphs <= 5
