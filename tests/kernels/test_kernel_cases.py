"""What `make gpu` measures: every rival computes what ours does."""
import functools
import inspect
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


@pytest.mark.parametrize("gain", [True, False])
def test_tuning_finds_keys_and_keeps_what_is_faster_and_right(monkeypatch, gain):
    cases = list(kernel_cases.region_routes("cpu", torch.float32, True))
    wanted, found, run_launch = [], {}, _launch.Launch.run
    times = {5: 0.5 if gain else 0.98, 6: 0.1}  # by stages

    def seconds(run, device):
        run()
        return times.get(run.__self__.configuration["num_stages"], 1.0)

    def refused_with_six_stages(launch):
        if launch.configuration["num_stages"] == 6:
            raise RuntimeError("out of resources")
        run_launch(launch)

    def keep(kernel, key, chosen):
        found[kernel, key] = chosen["num_stages"]

    monkeypatch.setattr(_launch.Launch, "run", refused_with_six_stages)
    monkeypatch.setattr(kernel_benchmark, "seconds", seconds)
    monkeypatch.setattr(kernel_benchmark, "neighbours", lambda present: [present | {"num_stages": n} for n in (5, 6)])
    with kernels.default_backend("triton"):
        kernel_benchmark.tune(cases, "cpu", kernel_benchmark.Deadline(math.inf), wanted.extend, keep)
    assert {name for _, name, _ in wanted} == {"region_means_forward", "region_means_backward", "region_routes_forward"}
    keys = ("region_means_forward", "cpu"), ("region_means_backward", "cpu"), ("region_routes_forward", "cpu regions16")
    assert found == (dict.fromkeys(keys, 5) if gain else {})
    with kernels.default_backend("triton"):
        kernel_benchmark.tune(cases, "cpu", kernel_benchmark.Deadline(0), wanted.extend, pytest.fail)


def test_neighbours_change_one_entry():
    assert kernel_benchmark.neighbours({"KEYS": 32, "num_stages": 1}) == [
        {"KEYS": 16, "num_stages": 1}, {"KEYS": 64, "num_stages": 1}, {"KEYS": 32, "num_stages": 2}]


def test_table_says_what_ran_out_of_memory():
    row = kernel_benchmark.Row("case", "forward", {"ours": 0.002}, {"ours": 2**20}, {"theirs": "out of memory"}, (0.001, 0.0005))
    lines = kernel_benchmark.table([row], kernel_benchmark.Ceilings(1e12, 1e15)).splitlines()
    assert lines[-2:] == ["| case | forward | theirs | out of memory | | | 1.000, 0.500 | |",
                          "| case | forward | ours | 2.000 | 1.00 | 1.0 | 1.000, 0.500 | 2.0 |"]
