import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo import kernels
from zoo.kernels import _backends, _interpreter, region_means
from zoo.kernels.__main__ import describe
from zoo.kernels._exporting import is_exporting
from zoo.kernels._launch import configuration, overridden


def chosen(backend, x, unsupported=lambda: None):
    return _backends.choose("halo_attention", backend, x, lambda: "blocked", unsupported={"triton": unsupported})


def test_cuda_tensors_take_the_kernels_where_they_fit():
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        assert chosen(None, x) == "triton"
        assert chosen(None, x, lambda: "that") == "blocked"
        assert chosen(None, x.double()) == "blocked"
        assert chosen("reference", x) == "reference"
        with kernels.default_backend("reference"):
            assert chosen(None, x) == "reference"
            assert chosen("triton", x) == "triton"
            assert chosen("pytorch", x) == "blocked"


def test_what_cannot_run_is_refused_with_the_reason():
    x = torch.zeros(1, 4, 4, 2)
    with pytest.raises(ValueError, match="means: backend must be None or one of 'reference', 'pytorch', 'pooled', 'triton', got 'cuda'"):
        region_means(x, (2, 2), backend="cuda")
    with pytest.raises(ValueError, match="region_means: backend 'triton' cannot run here: the kernels take .* not float64"):
        region_means(x.double(), (2, 2), backend="triton")
    with pytest.raises(ValueError, match="halo_attention: backend 'triton' cannot run here: too wide"):
        chosen("triton", x, lambda: "too wide")
    with pytest.raises(ValueError, match="default_backend: backend must be None or one of 'reference', 'pytorch', 'triton', got 'blocked'"):
        kernels.default_backend("blocked").__enter__()
    with pytest.raises(ValueError, match="cannot run here: the kernels take at most 65535 samples, not 65536"):
        region_means(torch.zeros(65536, 1, 1, 1), (1, 1), backend="triton")


def test_samples_beyond_32_bits_are_refused(kernel_device):
    with FakeTensorMode(), torch.device(kernel_device):
        x, routes = torch.empty(1, 1 << 10, 1 << 10, 2052), torch.empty(1, 1, 1, dtype=torch.int64)
        halo, table = torch.empty(1, 1 << 12, 1 << 12, 4, 16), torch.empty(21, 16)
        for run in (
            lambda: region_means(x, (1, 1), backend="triton"),
            lambda: kernels.routing_attention(x[:, :512], *[x[:, :, :512]] * 2, routes, (1, 1), 2052, backend="triton"),
            lambda: kernels.halo_attention(halo, halo, halo, table, table, 8, 3, backend="triton"),
        ):
            with pytest.raises(ValueError, match="2³¹"):
                run()


def test_the_interpreter_says_which_numpy_it_needs(monkeypatch):
    """Triton 3.6 is what comes with torch 2.11."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for triton, numpy, runs in (("3.6.0", "2.3.5", True), ("3.6.0", "2.4.6", False), ("3.7.1", "2.4.6", True), ("3.6.0", "3.0.0", False)):
        monkeypatch.setattr(_interpreter, "version", {"triton": triton, "numpy": numpy}.__getitem__)
        if runs:
            assert _interpreter.obstacle() is None and chosen("triton", torch.zeros(1)) == "triton"
            continue
        reason = f"the interpreter of Triton {triton} needs numpy below 2.4, but numpy is {numpy}"
        with pytest.raises(ValueError, match=f"halo_attention: backend 'triton' cannot run here: {reason}"):
            chosen("triton", torch.zeros(1))
        with pytest.raises(RuntimeError, match=f"zoo.kernels: {reason}"):
            _interpreter.correct_products.__wrapped__()


def test_the_interpreter_runs_only_when_asked_for(monkeypatch):
    x = torch.zeros(1, 4, 4, 2)
    assert chosen(None, x) == "blocked"
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
    assert "region_routes, float32, float16, bfloat16: pytorch, unless asked for" in describe(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    text = describe(torch.device("cpu"))
    for operator in _backends.operators_with_kernels():
        assert f"{operator}, float32, float16, bfloat16: pytorch, because on the CPU" in text


def test_the_most_specific_configuration_is_taken(monkeypatch):
    table = {"kernel": {"default": {"A": 1}, "bfloat16": {"A": 2}, "sm_90 bfloat16": {"A": 3}}}
    monkeypatch.setattr("zoo.kernels._launch._configurations", lambda: table)
    chosen = [configuration("kernel", *key)["A"] for key in (("sm_80", "float32"), ("sm_80", "bfloat16"), ("sm_90", "bfloat16"))]
    assert chosen == [1, 2, 3]
    with overridden("kernel", {"A": 4}):
        assert configuration("kernel", "sm_90", "bfloat16") == {"A": 4}
    table["kernel"]["sm_90"] = {"A": 5}
    assert configuration("kernel", "sm_90", "") == {"A": 5}


@pytest.mark.parametrize(("told", "expected"), [
    ("", "tf32x3 ieee ieee ieee"),
    ("torch.set_float32_matmul_precision('high')", "tf32 tf32 ieee ieee"),
    ("torch.backends.fp32_precision = 'tf32'", "tf32 tf32 ieee ieee"),
])
def test_precision_of_products_is_what_torch_was_told(told, expected):
    code = f"""
import torch
from zoo.kernels._launch import float32_precision, recording
{told}
for target in ("sm_90", "gfx942", "gfx90a", "cpu"):
    with recording(target):
        print(float32_precision(torch.device("cpu")))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == expected.split()


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_is_not_compiling(strict):
    class Network(torch.nn.Module):
        def forward(self, x):
            return x + (2.0 if is_exporting() else 1.0)

    x = torch.zeros(3)
    assert torch.equal(torch.compile(Network(), fullgraph=True, backend="eager")(x), x + 1)
    assert torch.equal(torch.export.export(Network(), (x,), strict=strict).module()(x), x + 2)
    assert torch.equal(Network()(x), x + 1)
