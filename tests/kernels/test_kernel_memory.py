"""What is kept for the backward pass is what its formula says."""
import re
import sys

import pytest

from benchmarks import kernel_memory
from zoo import kernels


@pytest.mark.parametrize("one", kernel_memory.EVERYTHING, ids=lambda one: f"{one.name}-{one.side}")
def test_formula_is_what_autograd_keeps(one):
    run, sizes, layer = one.build("cpu", True)
    launching = one.name == "BiLevelRoutingAttention"  # whose routes are made by one kernel and looked at before the next
    with kernels.default_backend("triton"):
        assert kernel_memory.measured(run, layer, launching) == one.bytes(sizes, "cpu")


@pytest.mark.parametrize("name", ["routing_attention", "HaloAttention", "token_aware_avg_pool", "BiLevelRoutingAttention"])
def test_what_runs_on_the_cpu_keeps_the_same(name, monkeypatch):
    monkeypatch.setattr(sys.modules["zoo.kernels.routing_attention"], "_fastest", lambda *_: "blocked")  # not as for a few keys
    (ours,) = (one for one in kernel_memory.EVERYTHING if (one.name, one.side) == (name, "ours"))
    run, sizes, layer = ours.build("cpu", True)
    assert kernel_memory.measured(run, layer) == ours.bytes(sizes, "cpu")


def test_the_page_holds_every_formula_and_it_is_right_there_too():
    page = kernel_memory.FILE.read_text()
    for one in kernel_memory.EVERYTHING:
        formula = re.escape(one.formula.replace("**2", "²").replace("*", "·"))
        row = re.search(rf"\| {one.name} \| {one.side} \| {formula} \| [^|]* \| ([\d.]+) \| ([\d.]+) \|", page)
        assert row and row[1] == row[2], f"{one.name}, {one.side}: run python -m benchmarks.kernel_memory"
