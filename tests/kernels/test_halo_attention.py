import math
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zoo.kernels import halo_attention

blocked, reference = (sys.modules[f"zoo.kernels.halo_attention.{name}"] for name in ("blocked", "reference"))
FORMULATIONS = {"blocked": blocked.halo_attention, "reference": reference.halo_attention}


def oracle(q, k, v, rel_h, rel_w, block, halo, scale):
    """The definition, a loop over queries and the keys of their windows that lie on the map or in its border of zeros."""
    (height, width), side = k.shape[1:3], len(rel_h) - block - 2 * halo + 1
    out = []
    for n, i, j, m in np.ndindex(*q.shape[:4]):
        query, scores, values = q[n, i, j, m], [], []
        top, left = i // side * block - halo, j // side * block - halo
        for y in range(top, min(top + block + 2 * halo, height + halo)):
            for x in range(left, min(left + block + 2 * halo, width + halo)):
                on_map = 0 <= y < height and 0 <= x < width
                score = query @ rel_h[y - top - i % side + side - 1] + query @ rel_w[x - left - j % side + side - 1]
                scores.append(score + scale * (query @ k[n, y, x, m]) if on_map else score)
                values.append(v[n, y, x, m] if on_map else v.new_zeros(v.shape[-1]))
        out.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    return torch.stack(out).view(*q.shape[:4], v.shape[-1])


def problem(size, block, halo, stride=1, heads=2, widths=(3, 4), batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q = draw(batch, *(math.ceil(n / stride) for n in size), heads, widths[0])
    tables = (draw(block + 2 * halo + block // stride - 1, widths[0]) for _ in range(2))
    return q, *(draw(batch, *size, heads, width) for width in widths), *tables, block, halo, 0.7


PROBLEMS = {
    "even": dict(size=(4, 6), block=2, halo=1),
    "ragged": dict(size=(5, 7), block=3, halo=1),
    "strided": dict(size=(4, 8), block=4, halo=2, stride=2),
    "strided, ragged": dict(size=(5, 6), block=4, halo=1, stride=2),
    "no halo": dict(size=(3, 4), block=2, halo=0),
    "halo beyond the block": dict(size=(7, 3), block=2, halo=3),
    "one position": dict(size=(1, 1), block=2, halo=1),
    "one block": dict(size=(3, 5), block=6, halo=0),
}


def with_gradients(function, arguments):
    out = function(*arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, arguments[:5], cotangent)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_formulation_is_the_definition(name, formulation, monkeypatch):
    monkeypatch.setitem(blocked.AT_ONCE, "cpu", 400)  # several steps, also within an image
    arguments = problem(**PROBLEMS[name])
    torch.testing.assert_close(with_gradients(FORMULATIONS[formulation], arguments), with_gradients(oracle, arguments))


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_in_float64(name):
    *tensors, block, halo, scale = problem(**PROBLEMS[name])
    assert torch.autograd.gradcheck(lambda *x: blocked.halo_attention(*x, block, halo, scale), tensors, fast_mode=True)


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)), side=st.integers(1, 5), halo=st.integers(0, 4), stride=st.integers(1, 2),
    heads=st.integers(1, 3), batch=st.integers(1, 3), at_once=st.sampled_from((1, 2000, 1 << 18)), seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_formulations_agree_on_any_shape(size, side, halo, stride, heads, batch, at_once, seed):
    arguments = problem(size, side * stride, halo, stride, heads, batch=batch, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocked.AT_ONCE, "cpu", at_once)
        ours = with_gradients(blocked.halo_attention, arguments)
    torch.testing.assert_close(ours, with_gradients(reference.halo_attention, arguments))


def test_public_function_is_the_definition():
    *tensors, block, halo, scale = problem((5, 6), 4, 1, 2)
    out = halo_attention(*tensors, block, halo, stride=2, scale=scale)
    torch.testing.assert_close(out, oracle(*tensors, block, halo, scale))
    torch.testing.assert_close(halo_attention(*tensors, block, halo, stride=2), oracle(*tensors, block, halo, 3**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_lower_precision(formulation, dtype):
    arguments = problem((9, 10), 4, 2, widths=(16, 16), dtype=dtype)
    exact = tuple(x.detach().double().requires_grad_() if torch.is_tensor(x) else x for x in arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    ours, theirs = with_gradients(FORMULATIONS[formulation], arguments), with_gradients(reference.halo_attention, exact)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), their, atol=tolerance * their.detach().abs().max().item(), rtol=0)


def test_memory_layouts_and_empty_batches():
    *tensors, block, halo, scale = problem((5, 7), 3, 1)
    expected = halo_attention(*tensors, block, halo, scale=scale)
    channels_first = [x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in tensors[:3]]
    torch.testing.assert_close(halo_attention(*channels_first, *tensors[3:], block, halo, scale=scale), expected)
    empty = [x[:0] for x in tensors[:3]]
    assert halo_attention(*empty, *tensors[3:], block, halo).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("block", [5, 8])
def test_a_block_as_large_as_the_map_is_global_attention_with_relative_positions(block):
    q, k, v, rel_h, rel_w, *_ = problem((5, 4), block, 0)
    y, x = (torch.arange(n).repeat_interleave(r).repeat(m) for n, r, m in ((5, 4, 1), (4, 1, 5)))
    offset_y, offset_x = (p - p[:, None] + block - 1 for p in (y, x))
    queries, keys, values = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    bias = torch.einsum("bmqd,qkd->bmqk", queries, rel_h[offset_y] + rel_w[offset_x])
    expected = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    torch.testing.assert_close(halo_attention(q, k, v, rel_h, rel_w, block, 0).flatten(1, 2).transpose(1, 2), expected)


def test_the_border_of_zeros_takes_part_and_what_lies_beyond_does_not():
    q, values = torch.zeros(1, 3, 3, 1, 2), torch.ones(1, 3, 3, 1, 1)
    for block in (3, 4, 7):  # windows of larger blocks reach beyond the border
        table = torch.zeros(2 * block + 1, 2)
        out = halo_attention(q, q, values, table, table, block, 1)
        torch.testing.assert_close(out, torch.full_like(out, 9 / 25))


def test_very_low_scores_beside_positions_beyond_the_border():
    q = torch.full((1, 3, 3, 1, 4), -10.0, requires_grad=True)
    k, v = torch.full_like(q, 10.0).requires_grad_(), torch.randn_like(q).requires_grad_()
    table = torch.zeros(3, 4)
    out = halo_attention(q, k, v, table, table, 2, 0, scale=1.0)
    torch.testing.assert_close(out[0, 2, 2], v[0, 2, 2])
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_windows_are_never_all_in_memory():
    """The largest tensor that forward and backward make, seen by a dispatch mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
            return out

    arguments = problem((64, 64), 8, 3, heads=4, widths=(16, 16), dtype=torch.float32)
    with Largest() as largest:
        blocked.halo_attention(*arguments).sum().backward()
    bordered = math.ceil(70 / 64 * 70 / 64 * arguments[1].numel())
    assert largest.elements <= max(2 * blocked.AT_ONCE["cpu"], bordered)
    with Largest() as largest:
        reference.halo_attention(*arguments)
    assert largest.elements >= 3 * arguments[1].numel()  # the check can fail


def test_operator_is_well_registered():
    torch.library.opcheck(blocked.halo_attention_forward, problem(**PROBLEMS["strided, ragged"], dtype=torch.float32))


@pytest.mark.parametrize("name", ["ragged", "strided"])
def test_compiles_whole(name):
    arguments = problem(**PROBLEMS[name], dtype=torch.float32)
    compiled = torch.compile(blocked.halo_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, arguments), with_gradients(blocked.halo_attention, arguments))


class Attention(nn.Module):
    def __init__(self, *options):
        super().__init__()
        self.options = options

    def forward(self, *tensors):
        return halo_attention(*tensors, *self.options)


def test_onnx_runs_at_other_sizes():
    def inputs(size):
        return tuple(x.detach() for x in problem(size, 3, 1, batch=1, dtype=torch.float32)[:5])

    module, size = Attention(3, 1).eval(), {1: torch.export.Dim("h", min=1), 2: torch.export.Dim("w", min=1)}
    shapes = ((size, size, size, {}, {}),)
    program = torch.onnx.export(module, inputs((6, 9)), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert not any(node.domain for node in program.model_proto.graph.node), "something other than the plain gather"
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for other in ((6, 9), (7, 4), (2, 11), (1, 1)):
        feeds = {put.name: x.numpy() for put, x in zip(session.get_inputs(), inputs(other), strict=True)}
        np.testing.assert_allclose(session.run(None, feeds)[0], module(*inputs(other)), atol=1e-5)


@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(q=torch.zeros(1, 4, 4, 6)), ValueError, r"q must be \(B, H, W, heads, d\), got shape \(1, 4, 4, 6\)"),
    (dict(k=torch.zeros(1, 4, 4, 2, 3, dtype=torch.int64)), TypeError, "k must be of a floating dtype, .*, got torch.int64"),
    (dict(q=torch.zeros(1, 2, 4, 2, 3)), ValueError, r"q must be \(1, 4, 4, 2, 3\) for k .* stride 1, got \(1, 2, 4, 2, 3\)"),
    (dict(v=torch.zeros(1, 4, 3, 2, 3)), ValueError, r"v must be \(1, 4, 4, 2, 'e'\), got \(1, 4, 3, 2, 3\)"),
    (dict(rel_w=torch.zeros(7, 3)), ValueError, r"rel_w must be \(5, 3\), got \(7, 3\)"),
    (dict(block_size=0), ValueError, "block_size must be at least 1, got 0"),
    (dict(stride=3), ValueError, r"stride must divide block_size \(2\), got 3"),
])
def test_bad_input_is_named(change, error, message):
    x, table = torch.zeros(1, 4, 4, 2, 3), torch.zeros(5, 3)
    arguments = dict(q=x, k=x, v=x, rel_h=table, rel_w=table, block_size=2, halo_size=1)
    with pytest.raises(error, match=message):
        halo_attention(**arguments | change)


def test_scores_of_hundreds():
    """Where the border's scores lie far above or below those on the map, nothing overflows and nothing is lost."""
    for at, scale in ((3, 300.0), (4, 300.0), (1, 500.0)):
        arguments = list(problem((5, 7), 3, 2))
        arguments[at] = (arguments[at].detach() * scale).requires_grad_()
        ours = with_gradients(blocked.halo_attention, arguments)
        torch.testing.assert_close(ours, with_gradients(reference.halo_attention, arguments))
