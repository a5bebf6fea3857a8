import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

from zoo import kernels
from zoo.kernels import selective_scan
from zoo.kernels.selective_scan import recomputed, reference

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
BACKENDS = ("reference", "recomputed")
SHAPES = {  # B, D, N, G, L
    "one chunk": (2, 6, 3, 2, 13),
    "two chunks": (1, 4, 2, 1, 65),
    "whole chunks": (2, 2, 1, 2, 128),
    "odd pairs": (1, 3, 4, 3, 63),
    "two positions": (2, 2, 3, 1, 2),
    "one position": (3, 2, 2, 2, 1),
    "no position": (2, 4, 2, 2, 0),
    "no sample": (0, 4, 2, 2, 5),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "positions first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "backwards": lambda x: x.flip(-1).contiguous().flip(-1),
}


def oracle(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
    """The definition, a loop over positions."""
    steps = delta if delta_bias is None else delta + delta_bias[:, None]
    steps = F.softplus(steps) if delta_softplus else steps
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))
    h, out = u.new_zeros(*u.shape[:2], A.shape[1]), torch.zeros_like(u) * delta
    for t in range(u.shape[2]):
        h = (steps[..., t, None] * A).exp() * h + (steps * u)[..., t, None] * B[..., t]
        out = out + F.one_hot(torch.tensor(t), u.shape[2]) * (h * C[..., t]).sum(-1, keepdim=True)
    return out if D is None else out + D[:, None] * u


def problem(batch=2, channels=6, states=3, groups=2, length=13, dtype=torch.float64, seed=0):
    """The seven arguments; δ with softplus is 0.02 to 5, so that some states fade at once and some not at all."""
    generator = torch.Generator().manual_seed(seed)
    of_channels, of_states = (batch, channels, length), (batch, groups, states, length)
    shapes = of_channels, of_channels, (channels, states), of_states, of_states, (channels,), (channels,)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[2] = -(2 * tensors[2]).exp()
    return [x.to(dtype).requires_grad_() for x in tensors]


def run(function, inputs, seed=1, **options):
    """The result and all gradients."""
    out = function(*inputs, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, cotangent, allow_unused=True, materialize_grads=True)


def near(ours, theirs, tolerance):
    """Of the largest; in float32, lengths of a hundred add up to this."""
    torch.testing.assert_close(ours, theirs, atol=tolerance * theirs.abs().max().item() if theirs.numel() else 0, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_definition_with_all_seven_gradients(name, backend):
    inputs = problem(*SHAPES[name])
    for count in (7, 5):  # without D and delta_bias, too
        for softplus in (True, False):
            given = inputs[:count] if softplus else [x.detach().abs().requires_grad_() if i in (1, 6) else x
                                                     for i, x in enumerate(inputs[:count])]
            found = run(selective_scan, given, delta_softplus=softplus, backend=backend)
            torch.testing.assert_close(found, run(oracle, given, delta_softplus=softplus))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout, backend):
    inputs = problem(length=70)

    def scan(*given):
        return selective_scan(*(LAYOUTS[layout](x) if x.ndim > 2 else x for x in given), True, backend)

    torch.testing.assert_close(run(scan, inputs), run(oracle, inputs, delta_softplus=True))


@given(batch=st.integers(0, 3), group=st.integers(1, 3), groups=st.integers(1, 3), states=st.integers(1, 5), length=st.integers(0, 140),
       backend=st.sampled_from(BACKENDS), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_any_shape(batch, group, groups, states, length, backend, seed):
    with torch.no_grad():
        inputs = problem(batch, group * groups, states, groups, length, seed=seed)
        torch.testing.assert_close(selective_scan(*inputs, True, backend), oracle(*inputs, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_float64(backend):
    inputs = problem(1, 2, 2, 1, 66)
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, True, backend), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_vanish_and_states_that_stay_do_no_harm(backend):
    """exp(δ A) is 0 at some positions and 1 at others; its products over a chunk would be divided by in vain."""
    u, delta, a, b, c, d, _ = problem(length=150, dtype=torch.float32)
    t = torch.arange(150)
    steps = torch.where(t % 7 == 0, 1e4, torch.where(t % 3 == 0, 1e-9, delta.detach().abs()))
    inputs = [u, steps.requires_grad_(), a, b, c, d]
    exact = run(oracle, [x.detach().double().requires_grad_() for x in inputs])
    for ours, theirs in zip(run(selective_scan, inputs, backend=backend), exact, strict=True):
        near(ours.double(), theirs, 1e-6)


def test_what_comes_later_changes_nothing_before():
    inputs = [x.detach() for x in problem(length=100)]
    for backend in BACKENDS:
        before = selective_scan(*inputs, True, backend)
        u, delta, a, b, c, d, bias = (x.clone() for x in inputs)
        for x in (u, delta, b, c):
            x[..., 70:] = 3
        assert torch.equal(selective_scan(u, delta, a, b, c, d, bias, True, backend)[..., :70], before[..., :70])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(dtype, backend):
    """Computed in float32: the error is that of rounding cotangents and results."""
    inputs = problem(length=130, dtype=dtype)
    ours = run(selective_scan, inputs, delta_softplus=True, backend=backend)
    theirs = run(oracle, [x.detach().double().requires_grad_() for x in inputs], delta_softplus=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        near(one.double(), other, 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_parameters_are_free_and_autocast_frees_all(backend):
    u, delta, a, b, c, d, bias = problem(dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in (u, delta, b, c)]
    inputs = [half[0], half[1], a, half[2], half[3], d, bias]
    out, *gradients = run(selective_scan, inputs, delta_softplus=True, backend=backend)
    assert [x.dtype for x in (out, *gradients)] == [x.dtype for x in (inputs[0], *inputs)]
    expected = oracle(*(x.float() for x in inputs), True)
    near(out.float(), expected, torch.finfo(torch.bfloat16).eps)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = selective_scan(u, half[1], a, half[2], half[3], d, bias, True, backend)
    torch.testing.assert_close(mixed, oracle(u, half[1].float(), a, half[2].float(), half[3].float(), d, bias, True))


def test_training_keeps_one_state_of_a_chunk():
    inputs, kept = problem(2, 6, 3, 2, 200, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        selective_scan(*inputs, delta_softplus=True)
    chunks = -(-200 // reference.CHUNK)
    assert sum(t.numel() for t in kept) == sum(x.numel() for x in inputs) + chunks * 2 * 6 * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensor_holds_the_states_of_all_positions(backend):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.most = max([self.most, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    inputs = [x.detach() for x in problem(1, 4, 8, 1, 2000)]
    with Largest() as seen:
        module = {"reference": reference.selective_scan, "recomputed": recomputed._forward._init_fn}[backend]
        module(*inputs, True)
    assert 0 < seen.most <= 4 * 2000 < 4 * 8 * 2000  # of a chunk, or the map itself


def test_compiles_whole(monkeypatch):
    for module in (reference, recomputed):
        monkeypatch.setattr(module, "CHUNK", 4)
    for backend, dynamic in (("reference", False), (None, True)):
        compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for shape in ((2, 6, 3, 2, 6), (1, 6, 3, 2, 5)):
            inputs = problem(*shape, torch.float32)
            torch.testing.assert_close(run(compiled, inputs, delta_softplus=True, backend=backend),
                                       run(selective_scan, inputs, delta_softplus=True, backend=backend))


def test_registration_is_sound():
    inputs = problem(1, 4, 2, 2, 66)
    torch.library.opcheck(recomputed._forward, (*inputs, True))
    torch.library.opcheck(recomputed._forward, (*inputs[:5], None, None, False))
    grad, firsts = inputs[0].detach(), recomputed._forward(*inputs, True)[1].detach()
    torch.library.opcheck(recomputed._backward, (grad, *(x.detach() for x in inputs), True, firsts))


class Scan(nn.Module):
    """Of learned A, D and delta_bias, as layers have them."""

    def __init__(self, channels=6, states=3):
        super().__init__()
        _, _, self.a, _, _, self.d, self.bias = map(nn.Parameter, problem(channels=channels, states=states, dtype=torch.float32))

    def forward(self, u, delta, b, c):
        return selective_scan(u, delta, self.a, b, c, self.d, self.bias, delta_softplus=True)


def given_to_scan(batch, length, dtype=torch.float32):
    u, delta, _, b, c, *_ = problem(batch, length=length, dtype=dtype)
    return tuple(x.detach() for x in (u, delta, b, c))


FREE = tuple({0: Dim.DYNAMIC, axis: Dim.DYNAMIC} for axis in (2, 2, 3, 3))
OTHERS = ((1, 1), (3, 150), (2, 64), (1, 2))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_free_lengths_more_than_once(strict):
    """A graph of one length first, whose numbers must not get into the next."""
    layer = Scan()
    for sizes, dynamic_shapes in ((((2, 20),), None), (OTHERS, FREE)):
        program = torch.export.export(layer, given_to_scan(2, 20), dynamic_shapes=dynamic_shapes, strict=strict).module()
        for size in sizes:
            inputs = given_to_scan(*size)
            near(program(*inputs), layer(*inputs), 1e-6)
    inputs = [x.requires_grad_() for x in given_to_scan(2, 30)]
    torch.testing.assert_close(run(program, inputs), run(layer, inputs))


@pytest.mark.parametrize("length", [0, 1])
def test_exports_of_the_shortest(length):
    inputs = given_to_scan(2, length)
    torch.testing.assert_close(torch.export.export(Scan(), inputs).module()(*inputs), Scan()(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exports_in_other_dtypes(dtype):
    inputs = given_to_scan(2, 20, dtype)
    out = torch.export.export(Scan(), inputs).module()(*inputs)
    torch.testing.assert_close(out, Scan()(*inputs))
    assert out.dtype == dtype


def test_onnx_runs_at_other_lengths_with_one_loop():
    layer = Scan()
    proto = torch.onnx.export(layer, given_to_scan(2, 20), dynamic_shapes=FREE, dynamo=True, verbose=False,
                              input_names=["u", "delta", "b", "c"]).model_proto
    assert [node.op_type for node in proto.graph.node].count("Scan") == 1
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for size in OTHERS:
        inputs = given_to_scan(*size)
        (found,) = session.run(None, dict(zip(("u", "delta", "b", "c"), (x.numpy() for x in inputs), strict=True)))
        near(torch.from_numpy(found), layer(*inputs).detach(), 1e-6)


def test_traces_of_torch_jit_run_at_other_lengths_and_are_saved(tmp_path):
    layer = Scan()
    torch.jit.save(torch.jit.trace(layer, given_to_scan(2, 20), check_trace=False), tmp_path / "scan.pt")
    graph = torch.jit.load(tmp_path / "scan.pt")
    for size in (*OTHERS, (2, 0), (0, 3)):
        inputs = given_to_scan(*size)
        near(graph(*inputs), layer(*inputs), 1e-6)
    inputs = [x.requires_grad_() for x in given_to_scan(2, 30)]
    torch.testing.assert_close(run(graph, inputs), run(layer, inputs))


def changed(**given):
    return dict(zip(NAMES, problem(), strict=True)) | given


@pytest.mark.parametrize(("given", "error", "message"), [
    (dict(u=[1.0]), TypeError, "u must be a tensor (B, D, L), got list"),
    (dict(delta=torch.zeros(2, 6, 12).double()), ValueError, "delta must have the shape of u, (2, 6, 13), got (2, 6, 12)"),
    (dict(u=torch.zeros(2, 6)), ValueError, "u must be (B, D, L), got shape (2, 6)"),
    (dict(A=torch.zeros(5, 3)), ValueError, "A must be (D, N) with the 6 channels of u, got (5, 3)"),
    (dict(A=torch.zeros(6, 0)), ValueError, "A must be (D, N), of which B and L alone may be 0, got shape (6, 0)"),
    (dict(A=torch.zeros(6, 3).long()), TypeError, "A must be of a floating dtype, float32, float64, float16 or bfloat16, got torch.int64"),
    (dict(B=torch.zeros(2, 4, 3, 13).double()), ValueError,
     "B must be (B, G, N, L) = (2, G, 3, 13) with a G that divides the 6 channels of u, got (2, 4, 3, 13)"),
    (dict(C=torch.zeros(2, 1, 3, 13).double()), ValueError, "C must have the shape of B, (2, 2, 3, 13), got (2, 1, 3, 13)"),
    (dict(C=torch.zeros(2, 2, 3, 13)), TypeError, "C must have the dtype of u (torch.float64), got torch.float32"),
    (dict(D=torch.zeros(5)), ValueError, "D must be (D,) with the 6 channels of u, got (5,)"),
    (dict(delta_bias=torch.zeros(7)), ValueError, "delta_bias must be (D,) with the 6 channels of u, got (7,)"),
    (dict(delta_bias=torch.zeros(6, device="meta")), ValueError, "delta_bias must be on the device of u (cpu), got meta"),
    (dict(delta_softplus=1), TypeError, "delta_softplus must be True or False, got 1"),
    (dict(backend="fast"), ValueError, "backend must be None or one of 'reference', 'pytorch', 'recomputed', 'triton', got 'fast'"),
])
def test_wrong_input_gets_one_sentence(given, error, message):
    with pytest.raises(error) as raised:
        selective_scan(**changed(**given))
    assert str(raised.value) == f"selective_scan: {message}"


def test_backends():
    assert kernels.backends("selective_scan") == ("reference", "pytorch", "recomputed", "triton")
