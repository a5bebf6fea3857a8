import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zoo.kernels import token_aware_avg_pool
from zoo.kernels.token_aware_avg_pool import convolved, recomputed, reference

FORMULATIONS = [module.token_aware_avg_pool for module in (reference, convolved, recomputed)]
SHAPES = {  # B, H, W, C, K
    "square": (2, 6, 6, 3, 4),
    "ragged": (3, 5, 7, 2, 3),
    "one position": (1, 1, 1, 4, 4),
    "map below the dilation": (2, 2, 3, 1, 6),
    "one scale": (2, 4, 3, 2, 1),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "strided": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


def oracle(x, weights):
    """The definition, a loop over positions, scales and the positions that each pools."""
    out = torch.zeros_like(x)
    (b, h, w, _), scales = x.shape, weights.shape[-1]
    for n, i, j, k in np.ndindex(b, h, w, scales):
        places = [(i + u, j + v) for u in (-k, 0, k) for v in (-k, 0, k)]
        inside = [x[n, y, z] for y, z in places if 0 <= y < h and 0 <= z < w]
        out[n, i, j] = out[n, i, j] + weights[n, i, j, k] * sum(inside) / 9
    return out


def problem(b, h, w, c, k, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, w, c), (b, h, w, k)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("pool", FORMULATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_definition_with_gradients_in_every_layout(name, layout, pool):
    inputs = problem(*SHAPES[name])
    expected = oracle(*inputs)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = pool(*map(LAYOUTS[layout], inputs))
    torch.testing.assert_close((out, *torch.autograd.grad(out, inputs, cotangent)),
                               (expected, *torch.autograd.grad(expected, inputs, cotangent)))


@given(b=st.integers(1, 3), h=st.integers(1, 6), w=st.integers(1, 6), c=st.integers(1, 4), k=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_any_shape(b, h, w, c, k, seed):
    with torch.no_grad():
        inputs = problem(b, h, w, c, k, seed=seed)
        torch.testing.assert_close(token_aware_avg_pool(*inputs), oracle(*inputs))


def test_gradients_in_float64():
    assert torch.autograd.gradcheck(token_aware_avg_pool, problem(2, 4, 5, 2, 3))


def test_one_scale_of_weight_one_is_the_identity():
    x, _ = problem(2, 5, 4, 3, 1)
    assert torch.equal(token_aware_avg_pool(x, torch.ones(2, 5, 4, 1, dtype=x.dtype)), x)


def test_a_constant_map_shrinks_at_the_border_only():
    x, weights = torch.ones(1, 7, 7, 1), torch.eye(3)[1].expand(1, 7, 7, 3)
    expected = torch.full((7, 7), 1.0)
    expected[[0, -1]] *= 2 / 3
    expected[:, [0, -1]] *= 2 / 3
    torch.testing.assert_close(token_aware_avg_pool(x, weights)[0, :, :, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(dtype):
    inputs = problem(2, 6, 9, 16, 4, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = token_aware_avg_pool(*inputs), token_aware_avg_pool(*exact)
    assert ours.dtype == dtype
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = (ours, *torch.autograd.grad(ours, inputs, cotangent)), (theirs, *torch.autograd.grad(theirs, exact, cotangent.double()))
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance * other.detach().abs().max().item(), rtol=0)


def test_autocast_leaves_the_dtype_of_x():
    x, weights = problem(2, 5, 5, 4, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = token_aware_avg_pool(x, weights.bfloat16())
    torch.testing.assert_close(out, token_aware_avg_pool(x, weights.bfloat16().float()))


def test_training_keeps_no_pooled_map():
    x, weights = problem(2, 8, 8, 16, 4, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_aware_avg_pool(x, weights)
    assert sum(t.numel() for t in kept) == x.numel() + weights.numel()


def test_compiles_whole():
    compiled = torch.compile(token_aware_avg_pool, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 6, 5, 4, 3), (3, 7, 6, 4, 3)):
        inputs = problem(*shape, torch.float32)
        out, expected = compiled(*inputs), token_aware_avg_pool(*inputs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


def test_registration_is_sound():
    inputs = problem(2, 4, 3, 2, 3)
    torch.library.opcheck(recomputed._forward, inputs)
    torch.library.opcheck(recomputed._backward, (inputs[0].detach(), *(x.detach() for x in inputs)))


class Pool(nn.Module):
    def forward(self, x, weights):
        return token_aware_avg_pool(x, weights)


def test_onnx_runs_at_other_sizes():
    free = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    inputs = tuple(x.detach() for x in problem(2, 9, 7, 4, 3, torch.float32))
    program = torch.export.export(Pool(), inputs, dynamic_shapes=(free, free))
    proto = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["x", "weights"]).model_proto
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for shape in ((1, 4, 20, 4, 3), (3, 2, 1, 4, 3)):
        x, weights = (x.detach() for x in problem(*shape, torch.float32))
        found = session.run(None, {"x": x.numpy(), "weights": weights.numpy()})[0]
        np.testing.assert_allclose(found, token_aware_avg_pool(x, weights).numpy(), atol=1e-5)


def test_bad_input_is_named():
    x, weights = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 2)
    for arguments, error, message in [
        ((x[0], weights), ValueError, r"x must be \(B, H, W, C\), got shape \(3, 4, 5\)"),
        ((x.long(), weights), TypeError, "floating dtype, .* torch.int64"),
        ((x, weights[:1]), ValueError, r"weights must be .* got \(1, 3, 4, 2\)"),
        ((x, weights[..., :0]), ValueError, r"B alone may be 0, got shape \(2, 3, 4, 0\)"),
        ((x, weights.double()), TypeError, r"dtype of x \(torch.float32\), got torch.float64"),
    ]:
        with pytest.raises(error, match=message):
            token_aware_avg_pool(*arguments)
