"""What `make gpu` measures: every rival computes what ours does."""
import math

import pytest
import torch

from benchmarks import kernel_cases
from zoo import kernels
from zoo.kernels import _launch
from zoo.measuring import kernel_benchmark


@pytest.mark.parametrize("operator", kernel_cases.CASES)
def test_rivals_compute_the_same(operator):
    torch.manual_seed(0)
    compared = 0
    for case in kernel_cases.CASES[operator]("cpu", torch.float32, True):
        assert case.operator == operator and case.ours.run().shape
        for rival in case.rivals.values():
            if list(map(id, rival.leaves)) == list(map(id, case.ours.leaves)):
                torch.testing.assert_close(rival.run(), case.ours.run(), atol=1e-5, rtol=1e-4)
                compared += 1
    assert compared or operator == "halo_attention"  # timm's takes maps and tables of other shapes


def test_flex_attention_computes_the_same():
    (case,) = kernel_cases.CASES["halo_attention"]("cpu", torch.float32, True)
    leaves = [leaf.detach() for leaf in case.ours.leaves]
    out = kernel_cases._flex_halo(*leaves, 8, 3, kernel_cases._flex_mask(leaves[0].shape[1], 8, 3, "cpu"))
    torch.testing.assert_close(out.transpose(1, 2).reshape(leaves[0].shape), kernels.halo_attention(*leaves, 8, 3))


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
