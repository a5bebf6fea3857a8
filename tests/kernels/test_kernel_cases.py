"""What `make gpu` measures: every rival computes what ours does."""
import functools
import inspect
import json
import math

import pytest
import torch
from torch.nn.attention import varlen

from benchmarks import kernel_cases, kernel_rivals
from zoo import kernels
from zoo.kernels import _launch
from zoo.measuring import kernel_benchmark


def results(side, cotangent=None):
    """What a side computes, and its gradients of its leaves."""
    out = side.run()
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) if cotangent is None else cotangent
    return out, *torch.autograd.grad(out, side.leaves, cotangent)


@pytest.mark.parametrize("operator", kernel_cases.CASES)
def test_rivals_compute_the_same_with_the_same_gradients(operator):
    torch.manual_seed(0)
    compared = set()
    for case in kernel_cases.CASES[operator]("cpu", torch.float32, True):
        ours = results(case.ours)
        assert case.operator == operator and case.rivals
        for name, rival in case.rivals.items():
            torch.testing.assert_close(results(rival), ours, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
            compared.add(name)
    if operator == "routing_attention":
        assert compared == {"authors", "gathered sdpa", "varlen flash", "masked sdpa", "FlexAttention, compiled"}


def test_the_floor_is_attention_over_the_same_keys():
    case = next(kernel_cases.routing_attention("cpu", torch.float32, True))
    (floor,), (qkv,) = case.floors.values(), case.ours.leaves
    torch.testing.assert_close(kernel_rivals.pasted_heads(floor.run(), 3, qkv), case.ours.run())


def test_varlen_calls_torch_as_it_is_called_on_a_gpu():
    given = inspect.signature(varlen.varlen_attn).parameters
    assert list(given)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"] and "scale" in given
    assert list(inspect.signature(kernel_rivals._varlen_on_cpu).parameters)[3:] == ["q_ends", "k_ends", "q_most", "k_most", "scale"]


def test_flex_attention_is_one_graph():
    """Block masks and scores as the GPU gets them, by torch's own operator."""
    case = next(kernel_cases.routing_attention("cpu", torch.float32, True))
    flex, expected = case.rivals["FlexAttention, compiled"], case.ours.run()
    compiled = functools.partial(torch.compile, backend="aot_eager")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiled)
        patch.setattr(kernel_rivals, "on_gpu", lambda x: True)
        torch.testing.assert_close(flex.run(), expected)
        (case,) = kernel_cases.halo_attention("cpu", torch.float32, True)
        torch.testing.assert_close(case.rivals["FlexAttention, compiled"].run(), case.ours.run())
        (case,) = kernel_cases.pyramid_sparse_attention("cpu", torch.float32, True)
        for x in case.ours.leaves:
            x.requires_grad_(False)  # torch's operator on the CPU has no gradients
        torch.testing.assert_close(case.rivals["FlexAttention, compiled"].run(), case.ours.run())


@pytest.fixture
def region_routes_cases(monkeypatch):
    """Cases of three small kernels, which are run as they would be timed."""
    with kernels.default_backend("triton"):
        yield list(kernel_cases.region_routes("cpu", torch.float32, True))


KERNELS = {("region_means_forward", ""), ("region_means_backward", ""), ("region_routes_forward", "regions16")}


@pytest.mark.parametrize("gain", [True, False])
def test_tuning_takes_what_is_faster_and_right(monkeypatch, region_routes_cases, gain):
    wanted, found, run_launch = [], [], _launch.Launch.run

    def seconds(run, device, quick=False):
        run()
        chosen = run.__self__.configuration
        tiles = {128: 0.5 if gain else 0.98, 256: 0.1}.get(chosen["CHANNELS"], 1.0)
        return tiles * (0.5 if gain and chosen["num_stages"] == 3 else 1.0)

    def refused_with_256_channels(launch):
        if launch.configuration["CHANNELS"] == 256:
            raise RuntimeError("out of resources")
        return run_launch(launch)

    monkeypatch.setattr(_launch.Launch, "run", refused_with_256_channels)
    monkeypatch.setattr(kernel_benchmark, "seconds", seconds)
    monkeypatch.setattr(kernel_benchmark, "tilings", lambda key, present: [present | {"CHANNELS": n} for n in (128, 256)])
    kernel_benchmark.tune(
        region_routes_cases, "cpu", kernel_benchmark.Deadline(math.inf), lambda some, deadline: wanted.extend(some), found.append)
    assert {(name, chosen["CHANNELS"]) for _, name, chosen in wanted} >= {(name, n) for name, _ in KERNELS for n in (128, 256)}
    assert {(tuned.kernel, tuned.key) for tuned in found} == KERNELS and len(found) == 6  # tiles, then stages
    for tuned in found[-3:]:
        assert (tuned.chosen["CHANNELS"] == 128 and tuned.chosen["num_stages"] == 3) == gain
        assert (tuned.after < tuned.before) == gain


def test_what_computes_something_else_is_not_taken(monkeypatch, region_routes_cases):
    run_launch, found = _launch.Launch.run, []

    def wrong_with_128_channels(launch):
        run_launch(launch)
        if launch.name == "region_means_forward" and launch.configuration["CHANNELS"] == 128:
            launch.arguments["means"].zero_()

    def seconds(run, device, quick=False):
        return 1 / run.__self__.configuration["CHANNELS"]

    monkeypatch.setattr(_launch.Launch, "run", wrong_with_128_channels)
    monkeypatch.setattr(kernel_benchmark, "seconds", seconds)
    monkeypatch.setattr(kernel_benchmark, "tilings", lambda key, present: [present | {"CHANNELS": 128}])
    kernel_benchmark.tune(region_routes_cases, "cpu", kernel_benchmark.Deadline(math.inf), lambda *wanted: None, found.append)
    assert {tuned.kernel: tuned.chosen["CHANNELS"] == 128 for tuned in found} == {
        "region_means_forward": False, "region_means_backward": True, "region_routes_forward": True}


def test_tuning_stops_in_time(region_routes_cases):
    said = []
    kernel_benchmark.tune(
        region_routes_cases, "cpu", kernel_benchmark.Deadline(0), lambda *wanted: None, lambda tuned: pytest.fail("no time"), said.append)
    assert said == ["no time left to tune the rest"] * 2


@pytest.mark.parametrize(("key", "present", "good"), [  # of 32 channels a head, counted in machine code
    ("regions64 16-bit 32", {"QUERIES": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2}, {"QUERIES": 128, "KEYS": 128, "num_warps": 8}),
    ("regions64 16-bit 32", {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 2}, {"QUERIES": 128, "KEYS": 64, "num_warps": 8}),
    ("queries64 16-bit 16", {"QUERIES": 32, "PATCH": 8, "num_warps": 4, "num_stages": 2}, {"QUERIES": 32, "PATCH": 4, "num_warps": 1}),
])
def test_the_grid_holds_tiles_that_are_several_steps_away(key, present, good):
    found = kernel_benchmark.tilings(key, present)
    assert present | good in found and present not in found and len(found) <= kernel_benchmark.MOST_TILINGS
    assert len({tuple(chosen.items()) for chosen in found}) == len(found)
    for chosen in found:
        assert set(chosen) == set(present) and chosen["num_stages"] == present["num_stages"]


def test_the_grid_leaves_out_what_does_not_fit():
    wide = {"QUERIES": 64, "KEYS": 32, "num_warps": 4, "num_stages": 2}
    assert all(chosen["num_warps"] >= 4 for chosen in kernel_benchmark.tilings("packed 32-bit 128", wide) if chosen["QUERIES"] == 64)
    most = {chosen["num_stages"] for chosen in kernel_benchmark.stages("packed 32-bit 128", wide | {"KEYS": 64, "num_warps": 8})}
    assert most == {1}


def test_every_kernel_has_a_grid():
    for kernel, entries in json.loads(_launch.CONFIGURATIONS.read_text()).items():
        for key, present in entries.items():
            assert len(kernel_benchmark.tilings(key, present)) >= 8, f"{kernel} {key}"


def test_launches_are_timed_with_buffers_of_their_own_tiles(monkeypatch):
    q = torch.randn(1, 8, 8, 4, requires_grad=True)
    routes, weights = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 2]])[None], torch.ones(1, 4, 2, requires_grad=True)
    side = kernel_benchmark.Side(
        lambda: kernels.routing_attention(q, q, q, routes, (2, 2), 1, weights=weights, backend="triton"), (q, weights))
    name, timed = "routing_attention_backward_queries", []
    monkeypatch.setattr(kernel_benchmark, "seconds", lambda run, *_, **__: timed.append(run.__self__) or 1.0)
    with _launch.recording() as launches:
        side.run().sum().backward()
    (present,) = (launch for launch in launches if launch.name == name)
    candidates = [present.configuration, *(present.configuration | {"QUERIES": queries} for queries in (16, 32, 64))]
    kernel_benchmark._fastest(side, kernel_benchmark.PASSES[1], name, present.key, candidates, "cpu", kernel_benchmark.Deadline(math.inf))
    assert {launch.configuration["QUERIES"] for launch in timed} >= {16, 32, 64}
    for launch in timed:
        rows = launch.arguments["grad_weights"].shape[2]
        assert launch.grid[0] == rows == 4 * -(-16 // launch.configuration["QUERIES"])


def test_table_says_what_ran_out_of_memory():
    row = kernel_benchmark.Row("case", "forward", {"ours": 0.002}, {"ours": 2**20}, {"theirs": "out of memory"}, (0.001, 0.0005))
    lines = kernel_benchmark.table([row], kernel_benchmark.Ceilings(1e12, 1e15)).splitlines()
    assert lines[-2:] == ["| case | forward | theirs | out of memory | | | 1.000, 0.500 | |",
                          "| case | forward | ours | 2.000 | 1.00 | 1.0 | 1.000, 0.500 | 2.0 |"]
