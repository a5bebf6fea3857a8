"""What `make gpu` measures: every rival computes what ours does."""
import pytest
import torch

from benchmarks import kernel_cases
from zoo import kernel_benchmark, kernels


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


@pytest.mark.skipif("halo_attention" not in kernel_cases.CASES, reason="this checkout has no halo attention")
def test_flex_attention_computes_the_same():
    (case,) = kernel_cases.CASES["halo_attention"]("cpu", torch.float32, True)
    leaves = [leaf.detach() for leaf in case.ours.leaves]
    out = kernel_cases._flex_halo(*leaves, 8, 3, kernel_cases._flex_mask(leaves[0].shape[1], 8, 3, "cpu"))
    torch.testing.assert_close(out.transpose(1, 2).reshape(leaves[0].shape), kernels.halo_attention(*leaves, 8, 3))


def test_tuning_finds_keys_and_keeps_what_is_right(monkeypatch):
    cases = list(kernel_cases.region_routes("cpu", torch.float32, True))
    times = iter(range(1000, 0, -1))  # every configuration is faster than the one before
    monkeypatch.setattr(kernel_benchmark, "seconds", lambda run, device: (run(), next(times))[1])
    monkeypatch.setattr(kernel_benchmark, "neighbours", lambda present: [present | {"num_warps": 2}, present | {"num_stages": 3}])
    wanted = []
    with kernels.default_backend("triton"):
        found = kernel_benchmark.tune(cases, "cpu", kernel_benchmark.Deadline(1000), wanted.extend)
    assert set(found) == {name for _, name, _ in wanted} == {"region_means_forward", "region_means_backward", "region_routes_forward"}
    for entries in found.values():
        (chosen,) = entries.values()
        assert chosen["num_stages"] == 3
    with kernels.default_backend("triton"):
        assert kernel_benchmark.tune(cases, "cpu", kernel_benchmark.Deadline(0), wanted.extend) == {}


def test_neighbours_change_one_entry():
    assert kernel_benchmark.neighbours({"KEYS": 32, "num_stages": 1}) == [
        {"KEYS": 16, "num_stages": 1}, {"KEYS": 64, "num_stages": 1}, {"KEYS": 32, "num_stages": 2}]


def test_table_says_what_ran_out_of_memory():
    row = kernel_benchmark.Row("case", "forward", {"ours": 0.002, "theirs": None}, {"ours": 2**20, "theirs": None}, (0.001, 0.0005))
    lines = kernel_benchmark.table([row], kernel_benchmark.Ceilings(1e12, 1e15)).splitlines()
    assert lines[-2:] == ["| case | forward | ours | 2.000 | 1.00 | 1.0 | 1.000, 0.500 | 2.0 |",
                          "| case | forward | theirs | out of memory | | | 1.000, 0.500 | |"]
