"""Every operator under every transform of torch, against finite differences in float64 or against itself without the transform."""
import contextlib
import importlib
import pickle

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from zoo import kernels
from zoo.kernels._backends import BACKENDS

ROUTES = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 2]]).expand(1, 4, 2)
LEVELS = torch.tensor([[1, 4], [2, 8], [0, 0]])  # of the last queries none, and of the second block of keys four tokens only

OPERATORS = {  # a function of tensors and of a backend, and the tensors' shapes
    "routing_attention": (lambda q, k, v, backend: kernels.routing_attention(q, k, v, ROUTES.to(q.device), (2, 2), 2, backend=backend),
                          [(1, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 6)]),
    "routing_attention, weighted": (
        lambda q, k, v, w, backend: kernels.routing_attention(q, k, v, ROUTES.to(q.device), (2, 2), 2, weights=w, backend=backend),
        [(1, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 6), (1, 4, 2)]),
    "region_means": (lambda x, backend: kernels.region_means(x, (2, 3), backend), [(1, 3, 4, 2)]),
    "region_routes": (lambda q, k, backend: kernels.region_routes(q, k, (2, 3), 2, backend)[1], [(1, 3, 7, 3), (1, 4, 5, 3)]),
    "halo_attention": (lambda q, k, v, h, w, backend: kernels.halo_attention(q, k, v, h, w, 2, 1, backend=backend),
                       [(1, 3, 4, 2, 2), (1, 3, 4, 2, 2), (1, 3, 4, 2, 3), (5, 2), (5, 2)]),
    "deform_conv2d": (lambda x, o, w, b, backend: kernels.deform_conv2d(x, o, w, b, padding=1, backend=backend),
                      [(1, 2, 3, 4), (1, 18, 3, 4), (3, 2, 3, 3), (3,)]),
    "deform_conv2d, masked": (lambda x, o, w, m, backend: kernels.deform_conv2d(x, o, w, None, 2, 1, mask=m, backend=backend),
                              [(1, 4, 4, 3), (1, 36, 2, 2), (2, 2, 3, 3), (1, 18, 2, 2)]),
    "depthwise_dynamic_conv2d": (kernels.depthwise_dynamic_conv2d, [(1, 2, 3, 4), (1, 2, 3, 3), (2,)]),
    "token_aware_avg_pool": (kernels.token_aware_avg_pool, [(1, 3, 4, 2), (1, 3, 4, 3)]),
    "pyramid_sparse_attention": (
        lambda q, k, v, backend: kernels.pyramid_sparse_attention(q, k, v, LEVELS.to(q.device).expand(1, 1, 3, 2), (2, 8), backend=backend),
        [(1, 1, 5, 2), (1, 1, 12, 2), (1, 1, 12, 3)]),
    "selective_scan": (
        lambda u, delta, a, b, c, d, bias, backend: kernels.selective_scan(u, delta, -a.square(), b, c, d, bias, True, backend),
        [(1, 4, 3), (1, 4, 3), (4, 2), (1, 2, 2, 3), (1, 2, 2, 3), (4,), (4,)]),
    "entmax": (lambda z, backend: kernels.entmax(z, 1.5, backend), [(2, 3, 5)]),
    "entmax, sparsemax": (lambda z, backend: kernels.entmax(z, 2.0, backend), [(2, 3, 5)]),
    "entmax, learned alpha": (lambda z, a, backend: kernels.entmax(z, 1 + a.sigmoid(), backend), [(2, 3, 5), (3, 1)]),
    "attention_cross_entropy": (
        lambda q, k, of_q, of_k, backend: kernels.attention_cross_entropy(q, k, of_q.sigmoid(), of_k.sigmoid(), 0.7, backend),
        [(1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 3, 5), (1, 2, 4, 5)]),
    "attention_similarity": (lambda q, k, backend: kernels.attention_similarity(q, k, 0.5, backend=backend), [(1, 2, 3, 2), (1, 2, 4, 2)]),
}
ONCE = {"torchvision"}  # whose operator has one derivative, and says so
UNSUITED = {("routing_attention, weighted", "dense"), ("deform_conv2d, masked", "gathered")}
STEP = 1e-5


def problem(name, backend=None, dtype=torch.float64):
    """The operator as a function of tensors, these, and directions in which to go."""
    function, shapes = OPERATORS[name]
    generator = torch.Generator().manual_seed(3)
    tensors, directions = ([torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes] for _ in range(2))
    return (lambda *x: function(*x, backend)), tensors, directions


def weighed(function):
    """The same with a scalar result, of which no element is linear or weighs as much as another."""
    def scalar(*tensors):
        out = function(*tensors)
        return ((out + out.square()) * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)).sum()
    return scalar


def moved(tensors, directions, step):
    return [x + step * direction for x, direction in zip(tensors, directions, strict=True)]


def slope(function, tensors, directions):
    """The derivative along the directions, of a tensor or a tuple of them, by finite differences."""
    after, before = (function(*moved(tensors, directions, step)) for step in (STEP, -STEP))
    if isinstance(after, tuple):
        return tuple((a - b) / (2 * STEP) for a, b in zip(after, before, strict=True))
    return (after - before) / (2 * STEP)


def gradient(function):
    """By plain autograd."""
    def compute(*tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*leaves), leaves)
    return compute


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


def func_gradient(scalar, tensors):
    return func.grad(scalar, tuple(range(len(tensors))))


def jvp(function, tensors, directions):
    return func.jvp(function, tuple(tensors), tuple(directions))[1], slope(function, tensors, directions)


def forward_mode(function, tensors, directions):
    with forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, tensors, directions))
        return forward_ad.unpack_dual(out).tangent, slope(function, tensors, directions)


def grad(function, tensors, directions):
    scalar = weighed(function)
    found = func_gradient(scalar, tensors)(*tensors)
    return (*found, dot(found, directions)), (*gradient(scalar)(*tensors), slope(scalar, tensors, directions))


def vmap(function, tensors, directions):
    several = [torch.stack([x, x + y, x - y]) for x, y in zip(tensors, directions, strict=True)]
    return func.vmap(function)(*several), torch.stack([function(*x) for x in zip(*several, strict=True)])


def gradients_of_samples(function, tensors, directions):
    scalar, several = weighed(function), [torch.stack([x, x + y]) for x, y in zip(tensors, directions, strict=True)]
    expected = [gradient(scalar)(*x) for x in zip(*several, strict=True)]
    return func.vmap(func_gradient(scalar, tensors))(*several), tuple(map(torch.stack, zip(*expected, strict=True)))


def jacobian_forwards(function, tensors, directions):
    return (func.jacfwd(function, tuple(range(len(tensors))))(*tensors),
            torch.autograd.functional.jacobian(function, tuple(tensors)))


def vjp_of_vjp(function, tensors, directions):
    scalar = weighed(function)
    _, pull = func.vjp(lambda *x: dot(func_gradient(scalar, tensors)(*x), directions), *tensors)
    return pull(torch.tensor(1.0, dtype=torch.float64)), slope(gradient(scalar), tensors, directions)


def forward_over_reverse(function, tensors, directions):
    scalar = weighed(function)
    found = func.jvp(func_gradient(scalar, tensors), tuple(tensors), tuple(directions))[1]
    return found, slope(gradient(scalar), tensors, directions)


def twice(function, tensors, directions):
    """Double backward, of arguments of which each is made of the one before, as those of a network are."""
    scalar = weighed(function)
    leaves = [x.clone().requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(scalar(*leaves), leaves, create_graph=True)
    found = torch.autograd.grad(dot(gradients, directions), leaves, create_graph=True, materialize_grads=True)
    return found, slope(gradient(scalar), tensors, directions)


def chained(function, tensors, directions):
    """Third derivatives where every argument is made of the one before, of which no part of the graph may count twice."""
    scalar = weighed(function)

    def penalty(start, further):
        """The derivative of the squared slope at `start`, with its graph if it goes `further`, and `start` as a leaf."""
        leaf = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        t, at = leaf, []
        for x, direction in zip(tensors, directions, strict=True):
            at.append(x + t * direction)
            t = t + at[-1].mean()
        (along,) = torch.autograd.grad(scalar(*at), leaf, create_graph=True)
        return torch.autograd.grad(along.square(), leaf, create_graph=further)[0], leaf

    found = torch.autograd.grad(*penalty(0.1, True))[0]
    after, before = (penalty(0.1 + step, False)[0] for step in (STEP, -STEP))
    return found, (after - before) / (2 * STEP)


def thrice(function, tensors, directions):
    scalar = weighed(function)
    leaves = [x.clone().requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(scalar(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(dot(gradients, directions), leaves, create_graph=True, materialize_grads=True)
    total = dot(second, directions)
    found = torch.autograd.grad(total, leaves, materialize_grads=True) if total.requires_grad else tuple(map(torch.zeros_like, leaves))
    return found, slope(lambda *x: twice(function, x, directions)[0], tensors, directions)


def batched_gradients(function, tensors, directions):
    jacobian = torch.autograd.functional.jacobian
    return jacobian(function, tuple(tensors), vectorize=True), jacobian(function, tuple(tensors))


def checkpointed(function, tensors, directions):
    leaves = [x.clone().requires_grad_() for x in tensors]
    found = [torch.autograd.grad(checkpoint(weighed(function), *leaves, use_reentrant=False), leaves)]
    checkpoint(weighed(function), *leaves, use_reentrant=True).backward()
    found.append(tuple(x.grad for x in leaves))
    return tuple(found), (gradient(weighed(function))(*tensors),) * 2


def compiled(function, tensors, directions):
    def all_of_them(*tensors):
        scalar = weighed(function)
        return (func.jvp(function, tensors, tuple(directions))[1],
                func.vmap(func_gradient(scalar, tensors))(*(torch.stack([x, 2 * x]) for x in tensors)))
    torch._dynamo.reset()  # the same code, of another operator
    return torch.compile(all_of_them, fullgraph=True, backend="eager")(*tensors), all_of_them(*tensors)


TRANSFORMS = [jvp, forward_mode, grad, vmap, gradients_of_samples, jacobian_forwards, vjp_of_vjp, forward_over_reverse]
AUTOGRAD = [twice, chained, thrice, batched_gradients, checkpointed]


def test_every_operator_is_here():
    operators = set(kernels.__all__) - {"backends", "default_backend"}
    assert {name.partition(",")[0] for name in OPERATORS} == operators


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_transforms(name, transform):
    torch.testing.assert_close(*transform(*problem(name)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "backend", "transform"), [
    (name, backend, transform) for name in OPERATORS for backend in kernels.backends(name.partition(",")[0]) for transform in AUTOGRAD
    if backend not in ("triton", "pytorch") and not (backend == "reference" and transform is batched_gradients)])  # torch's own, and slow
def test_autograd_of_every_backend(name, backend, transform):
    if (name, backend) in UNSUITED:
        refused = pytest.raises(ValueError, match="cannot run here: it takes")
    elif backend in ONCE and transform in (twice, chained, thrice):
        refused = pytest.raises(RuntimeError, match="double backward")
    else:
        refused = contextlib.nullcontext()
    with refused:
        found, expected = transform(*problem(name, backend))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in OPERATORS if "," not in name])
def test_transforms_within_compiled_functions(name):
    torch.testing.assert_close(*compiled(*problem(name)))


@pytest.mark.parametrize("name", OPERATORS)
def test_other_backends_refuse_transforms(name):
    for backend in set(kernels.backends(name.partition(",")[0])) - {"reference", "pytorch"}:
        for transform, called in ((jvp, "a transform of torch.func"), (vmap, "a transform of torch.func"),
                                  (forward_mode, "forward-mode differentiation")):
            with pytest.raises(ValueError, match=f"backend '{backend}' cannot run here: {called} needs backend 'reference'"):
                transform(*problem(name, backend))


@pytest.mark.parametrize("name", [name for name in OPERATORS if "triton" in kernels.backends(name.partition(",")[0])])
def test_second_derivatives_of_the_kernels(name, kernel_device):
    def second(backend):
        function, tensors, directions = problem(name, backend, torch.float32)
        leaves, directions = ([x.to(kernel_device) for x in several] for several in (tensors, directions))
        leaves = [x.requires_grad_() for x in leaves]
        gradients = torch.autograd.grad(weighed(function)(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(dot(gradients, directions), leaves, materialize_grads=True)

    torch.testing.assert_close(second("triton"), second("reference"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_leaves_of_fx_graphs(name):
    function, tensors, _ = problem(name)
    names = [f"x{i}" for i in range(len(tensors))]
    root = eval(f"lambda {', '.join(names)}: f({', '.join(f'2 * {x}' for x in names)}) + 1", {"f": function})  # noqa: S307  fx wants names
    graph = torch.fx.symbolic_trace(root)
    operator = getattr(kernels, name.partition(",")[0])
    assert [node.target for node in graph.graph.nodes].count(operator) == 1
    for traced in (graph, pickle.loads(pickle.dumps(graph))):  # noqa: S301
        torch.testing.assert_close(traced(*tensors), root(*tensors))


def test_modes_and_subclasses_see_one_call():
    class Seen(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.functions = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.functions.append(function)
            return function(*args, **(kwargs or {}))

    class Labelled(torch.Tensor):
        pass

    function, tensors, _ = problem("token_aware_avg_pool")
    with Seen() as seen:
        function(*tensors)
    assert seen.functions == [kernels.token_aware_avg_pool]
    out = function(tensors[0].as_subclass(Labelled), tensors[1])
    assert type(out) is Labelled
    torch.testing.assert_close(out.as_subclass(torch.Tensor), function(*tensors))


# What multiplies more than the definition has to: the whole map, neighbourhoods laid side by side, averages as convolutions.
MORE = {("routing_attention", "dense"), ("depthwise_dynamic_conv2d", "reference"), ("token_aware_avg_pool", "convolved")}


def operations(name, backend, device):
    """Of the forward pass, and of both passes."""
    function, tensors, _ = problem(name, backend, torch.float32)
    leaves, counts = [x.to(device).requires_grad_() for x in tensors], []
    for runs_backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            out = function(*leaves).sum()
            if runs_backward:
                out.backward()
        counts.append(counter.get_total_flops())
    return counts


@pytest.mark.parametrize("name", OPERATORS)
def test_counters_see_the_products_of_the_definition(name, kernel_device):
    operator = name.partition(",")[0]
    not_ours = {"pytorch", "torchvision"} | {backend for case, backend in UNSUITED if case == name}
    counted = {backend: operations(name, backend, kernel_device if backend == "triton" else "cpu")
               for backend in kernels.backends(operator) if backend not in not_ours}
    forward = counted["grouped" if operator == "depthwise_dynamic_conv2d" else "reference"][0]
    assert (forward > 0) == (operator not in ("region_means", "token_aware_avg_pool", "selective_scan", "entmax"))
    for backend, (found, both) in counted.items():
        if (operator, backend) in MORE:
            assert found > forward, backend
        elif backend in ("grouped", "positions_first"):  # torch counts the gradient of a grouped convolution's kernel for every group
            assert found == forward, backend
        else:
            assert (found, both) == (forward, 3 * forward), backend


def test_every_custom_operator_tells_counters_its_operations():
    for operator, names in BACKENDS.items():
        for name in set(names) - {"pytorch"}:
            importlib.import_module(f"zoo.kernels.{operator}.{name}")
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zoo::")]
    assert len(ours) >= 20
    assert all(getattr(torch.ops.zoo, name.removeprefix("zoo::").partition(".")[0]) in flop_registry for name in ours)
