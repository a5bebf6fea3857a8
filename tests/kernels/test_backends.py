import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo import kernels
from zoo.kernels import _backends, region_means
from zoo.kernels.__main__ import describe
from zoo.kernels._exporting import is_exporting
from zoo.kernels._launch import configuration, overridden


def test_cuda_tensors_take_the_kernels_where_they_fit():
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        assert _backends.use_triton("operator", None, x)
        assert not _backends.use_triton("operator", None, x, unsupported="that")
        assert not _backends.use_triton("operator", None, x.double())
        assert not _backends.use_triton("operator", "reference", x)
        with kernels.default_backend("reference"):
            assert not _backends.use_triton("operator", None, x)
            assert _backends.use_triton("operator", "triton", x)


def test_what_cannot_run_is_refused_with_the_reason():
    x = torch.zeros(1, 4, 4, 2)
    with pytest.raises(ValueError, match="region_means: backend must be None, 'reference' or 'triton', got 'cuda'"):
        region_means(x, (2, 2), backend="cuda")
    with pytest.raises(ValueError, match="region_means: backend 'triton' cannot run here: the kernels take .* not float64"):
        region_means(x.double(), (2, 2), backend="triton")
    with pytest.raises(ValueError, match="operator: backend 'triton' cannot run here: too wide"):
        _backends.use_triton("operator", "triton", x, unsupported="too wide")


def test_the_interpreter_runs_only_when_asked_for(monkeypatch):
    x = torch.zeros(1, 4, 4, 2)
    assert not _backends.use_triton("operator", None, x)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        region_means(x, (2, 2), backend="triton")
    monkeypatch.setattr(_backends, "_installed", lambda: False)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        region_means(x, (2, 2), backend="triton")


def test_exported_graphs_hold_the_reference(kernel_device):
    class Means(torch.nn.Module):
        def forward(self, x):
            return region_means(x, (2, 2), backend="triton")

    exported = torch.export.export(Means(), (torch.zeros(1, 4, 4, 2, device=kernel_device),))
    assert not any("triton" in str(node.target) for node in exported.graph.nodes)


def test_kernels_are_imported_when_they_run():
    code = "import sys, zoo.layers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "zoo.kernels.region_routes" in loaded and "zoo.kernels.region_routes.triton" not in loaded


def test_machine_is_described(monkeypatch):
    assert "region_routes, float32, float16, bfloat16: reference, unless asked for" in describe("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    text = describe("cpu")
    for operator in _backends.operators_with_kernels():
        assert f"{operator}, float32, float16, bfloat16: reference, because on the CPU" in text


def test_the_most_specific_configuration_is_taken(monkeypatch):
    table = {"kernel": {"default": {"A": 1}, "bfloat16": {"A": 2}, "sm_90 bfloat16": {"A": 3}}}
    monkeypatch.setattr("zoo.kernels._launch._configurations", lambda: table)
    chosen = [configuration("kernel", *key)["A"] for key in (("sm_80", "float32"), ("sm_80", "bfloat16"), ("sm_90", "bfloat16"))]
    assert chosen == [1, 2, 3]
    with overridden("kernel", {"A": 4}):
        assert configuration("kernel", "sm_90", "bfloat16") == {"A": 4}


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_is_not_compiling(strict):
    class Network(torch.nn.Module):
        def forward(self, x):
            return x + (2.0 if is_exporting() else 1.0)

    x = torch.zeros(3)
    assert torch.equal(torch.compile(Network(), fullgraph=True, backend="eager")(x), x + 1)
    assert torch.equal(torch.export.export(Network(), (x,), strict=strict).module()(x), x + 2)
    assert torch.equal(Network()(x), x + 1)
