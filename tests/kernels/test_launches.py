"""What is prepared once for tensors of the same shapes, and the way around torch.library where nobody looks on."""
import gc
import importlib
import threading
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from zoo.kernels import _backends, _launch, _remembering, token_aware_avg_pool
from zoo.kernels._launch import Prepared, add_configurations, overridden, planned, recording
from zoo.kernels.token_aware_avg_pool import triton as pool

KERNEL = "token_aware_avg_pool_forward"


@pytest.fixture
def problem(kernel_device):
    return torch.randn(2, 5, 4, 3, device=kernel_device), torch.randn(2, 5, 4, 2, device=kernel_device)


@pytest.fixture
def built(monkeypatch):
    """A planned function, and of which shapes its plans were built."""
    shapes = []

    @planned
    def plan(x, *numbers):
        shapes.append(tuple(x.shape))
        return object()

    yield plan, shapes
    _launch._plans.pop()


def test_plans_are_built_once_for_shapes_strides_dtypes_and_numbers(built):
    plan, shapes = built
    x = torch.zeros(4, 6)
    assert plan(x, 2) is plan(x.clone(), 2) is plan(torch.ones(4, 6), 2)
    others = [plan(x, 2), plan(x[:2], 2), plan(x.t().contiguous().t(), 2), plan(x.bfloat16(), 2), plan(x, 3), plan(x, 2.0), plan(x, [2]),
              plan(x, (2.0,)), plan(x.to("meta"), 2)]
    assert len({id(other) for other in others}) == len(shapes) == 9


def test_tables_of_plans_do_not_grow_without_bound(built, monkeypatch):
    plan, shapes = built
    monkeypatch.setattr(_remembering, "MOST", 5)
    for length in [*range(20), 19, 18]:
        plan(torch.zeros(length))
    assert len(shapes) == 20 and len(_launch._plans[-1]) == 5


def test_plans_hold_no_tensor(kernel_device):
    leaves = [torch.randn(1, 3, 4, channels, device=kernel_device).requires_grad_() for channels in (7, 2)]
    token_aware_avg_pool(*leaves, "triton").sum().backward()
    seen = [weakref.ref(x) for x in leaves]
    del leaves
    gc.collect()
    assert not any(x() is not None for x in seen)
    plans = [part for table in _launch._plans for plan in table.values() for part in (plan if isinstance(plan, tuple) else (plan,))]
    assert plans and not any(isinstance(value, torch.Tensor) for plan in plans if isinstance(plan, Prepared) for value in
                             (*plan._numbers.values(), *plan._values))


def test_plans_heed_configurations_recordings_and_precision(built, monkeypatch, tmp_path):
    plan, shapes = built
    x = torch.zeros(3)
    first = plan(x)
    with overridden(KERNEL, {"POSITIONS": 16, "CHANNELS": 16}):
        assert plan(x) is not first
    with recording("sm_90"):
        assert plan(x) is not first
    assert plan(x) is first
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert plan(x) is not first
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert plan(x) is first
    file = tmp_path / "configurations.json"
    file.write_text(_launch.CONFIGURATIONS.read_text())
    monkeypatch.setattr(_launch, "CONFIGURATIONS", file)
    add_configurations({KERNEL: {"sm_99": {"POSITIONS": 16, "CHANNELS": 16, "num_warps": 4}}})
    assert plan(x) is not first
    monkeypatch.undo()
    _launch._configurations.cache_clear()


def test_another_configuration_is_what_runs(problem):
    chosen = {"POSITIONS": 16, "CHANNELS": 4, "num_warps": 2, "num_stages": 1}
    expected = token_aware_avg_pool(*problem, "triton")
    with overridden(KERNEL, chosen), recording(launching=True) as launches:
        torch.testing.assert_close(token_aware_avg_pool(*problem, "triton"), expected)
    assert [(launch.name, launch.configuration, launch.grid) for launch in launches] == [(KERNEL, chosen, (2, 1, 2))]


def test_threads_share_plans(built):
    plan, _ = built
    failed = []

    def work():
        try:
            for length in list(range(50)) * 20:
                assert plan(torch.zeros(length)) is not None
        except Exception as error:  # noqa: BLE001  whatever it is, in the other thread
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


class Compiled:
    """What Triton's compiler returns, which notes what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *values: self.launches.append((grid, values))


def test_compiled_kernels_get_addresses_and_one_is_kept_for_every_alignment(monkeypatch):
    made = []

    def run(launch):
        made.append(Compiled())
        return made[-1]

    monkeypatch.setattr(_launch.Launch, "run", run)
    x, weights = torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 4, 2)
    shifted = torch.zeros(x.numel() + 1)[1:].view(x.shape)
    assert shifted.data_ptr() % 16 and shifted.stride() == x.stride()
    prepared = pool._pooling.__wrapped__(x, weights, False)
    for maps in (x, x.clone(), shifted, shifted, x):
        prepared(maps, weights, x)
    aligned, other = made
    assert len(aligned.launches) == 2 and len(other.launches) == 1
    grid, values = aligned.launches[-1]
    given = dict(zip(pool.token_aware_avg_pool_forward.arg_names, values, strict=True))
    assert (given["x"], given["weights"], given["out"]) == (x.data_ptr(), weights.data_ptr(), x.data_ptr())
    assert (given["height"], given["width"], given["POOLS"], given["TRANSPOSED"]) == (5, 4, 2, False)
    assert len(grid) == 3
    assert dict(zip(pool.token_aware_avg_pool_forward.arg_names, other.launches[0][1], strict=True))["x"] == shifted.data_ptr()


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_who_looks_on_sees_operators_of_torch_library(problem):
    x, weights = problem
    called = []

    class Seen(Mode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        token_aware_avg_pool(x, weights, "triton")
    assert "zoo.token_aware_avg_pool_triton.default" in called
    graph = make_fx(lambda x: token_aware_avg_pool(x, weights, "triton"))(x)
    assert any("token_aware_avg_pool_triton" in str(node.target) for node in graph.graph.nodes)


def test_observed(problem):
    class Labelled(torch.Tensor):
        pass

    x, found = problem[0], []

    def look(y):
        found.append(_backends.observed((y, 1, None)))
        return y * 2

    look(x)
    with torch.inference_mode(), torch.autocast(x.device.type), torch.no_grad():
        look(x)
    assert found == [False, False]
    found.clear()
    torch.func.vmap(look)(x)
    torch.func.grad(lambda y: look(y).sum())(x)
    with forward_ad.dual_level():
        look(x)
    with Mode():
        look(x)
    make_fx(look, pre_dispatch=True)(x)
    torch.jit.trace(look, x, check_trace=False)
    look(x.as_subclass(Labelled))
    assert len(found) >= 7 and all(found)


def test_gradients_are_those_of_the_operator_of_torch_library(problem):
    leaves = [x.requires_grad_() for x in problem]

    def derivatives():
        out = token_aware_avg_pool(*leaves, "triton")
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return out, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    direct = derivatives()
    with Mode():
        torch.testing.assert_close(direct, derivatives())


def test_batched_gradients_of_kernels_are_those_one_by_one(problem):
    x, weights = problem
    jacobian = torch.autograd.functional.jacobian
    small = x[:1, :2, :2].contiguous(), weights[:1, :2, :2].contiguous()

    def run(*tensors):
        return token_aware_avg_pool(*tensors, "triton")

    torch.testing.assert_close(jacobian(run, small, vectorize=True), jacobian(run, small))


def test_every_operator_has_its_way_around():
    for operator in _backends.operators_with_kernels():
        module = importlib.import_module(f"zoo.kernels.{operator}.triton")
        assert any(isinstance(value, _backends.Direct) for value in vars(module).values())
