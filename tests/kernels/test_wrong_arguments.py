"""Wrong arguments of every operator end in one sentence, the same on every backend; right ones near the border agree on all."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import kernels


def halo(k=(1, 4, 4, 2, 3), block_size=2, halo_size=1, stride=1, **given):
    offsets = block_size + 2 * halo_size + block_size // stride - 1
    q = (k[0], -(-k[1] // stride), -(-k[2] // stride), *k[3:])
    return dict(q=torch.randn(q), k=torch.randn(k), v=torch.randn(k), rel_h=torch.randn(offsets, k[4]), rel_w=torch.randn(offsets, k[4]),
                block_size=block_size, halo_size=halo_size, stride=stride, scale=0.5) | given


def deform(batch=2, channels=4, size=(5, 6), side=3, stride=1, padding=1, dilation=1):
    out = [(n + 2 * padding - dilation * (side - 1) - 1) // stride + 1 for n in size]
    return dict(x=torch.randn(batch, channels, *size), offset=torch.randn(batch, 2 * side**2, *out),
                weight=torch.randn(6, channels, side, side), bias=torch.randn(6), stride=stride, padding=padding, dilation=dilation,
                mask=torch.randn(batch, side**2, *out))


def pyramid(queries=5, keys=20, blocks=(2, 16), levels=None, batch=2):
    """Of all levels, in turn."""
    shape = batch, 2, -(-queries // blocks[0]), -(-keys // blocks[1])
    kinds = torch.tensor([1, 0, 8, 2, 4, 1, 0])[torch.arange(math.prod(shape)) % 7].view(shape)
    return dict(q=torch.randn(batch, 2, queries, 3), k=torch.randn(batch, 2, keys, 3), v=torch.randn(batch, 2, keys, 4),
                levels=kinds if levels is None else torch.full(shape, levels), block_size=blocks, scale=0.5)


def scan(batch=2, channels=4, states=3, groups=2, length=5, softplus=True):
    of_channels, of_states = (batch, channels, length), (batch, groups, states, length)
    return dict(u=torch.randn(of_channels), delta=torch.randn(of_channels), A=-torch.rand(channels, states), B=torch.randn(of_states),
                C=torch.randn(of_states), D=torch.randn(channels), delta_bias=torch.randn(channels), delta_softplus=softplus)


RIGHT = {  # the operators' arguments, by name
    "halo_attention": halo,
    "deform_conv2d": deform,
    "depthwise_dynamic_conv2d": lambda: dict(x=torch.randn(2, 3, 4, 5), kernels=torch.randn(2, 3, 3, 3), theta=torch.randn(3)),
    "token_aware_avg_pool": lambda: dict(x=torch.randn(2, 4, 5, 3), weights=torch.randn(2, 4, 5, 2)),
    "region_means": lambda: dict(x=torch.randn(2, 4, 5, 3), regions=(2, 2)),
    "attention_cross_entropy": lambda: dict(
        q=torch.randn(2, 2, 3, 4), k=torch.randn(2, 2, 5, 4), of_q=0.1 + torch.rand(2, 2, 3, 6), of_k=0.1 + torch.rand(2, 2, 5, 6),
        scale=0.5),
    "attention_similarity": lambda: dict(q=torch.randn(2, 2, 3, 4), k=torch.randn(2, 2, 5, 4), threshold=0.5, scale=0.5),
    "pyramid_sparse_attention": pyramid,
    "selective_scan": scan,
}
LEAST = {"block_size": 1, "halo_size": 0, "stride": 1, "padding": 0, "dilation": 1, "regions": 1}
FREE_DTYPE = {"rel_h", "rel_w", "theta", "of_q", "of_k", "A", "D", "delta_bias"}
# The axes of each tensor that have to fit others, and what may be named for it: the one or another.
FITTING = {
    ("halo_attention", "q"): ((0, 1, 2, 3, 4), ("q",)), ("halo_attention", "k"): ((0, 1, 2, 3, 4), ("q", "v", "rel_h")),
    ("halo_attention", "v"): ((0, 1, 2, 3), ("v",)), ("halo_attention", "rel_h"): ((0, 1), ("rel_h",)),
    ("halo_attention", "rel_w"): ((0, 1), ("rel_w",)),
    ("deform_conv2d", "x"): ((0, 1, 2, 3), ("offset", "weight")), ("deform_conv2d", "offset"): ((0, 1, 2, 3), ("offset",)),
    ("deform_conv2d", "weight"): ((0, 1, 2, 3), ("weight", "offset", "bias")), ("deform_conv2d", "bias"): ((0,), ("bias",)),
    ("deform_conv2d", "mask"): ((0, 1, 2, 3), ("mask",)),
    ("depthwise_dynamic_conv2d", "x"): ((0, 1), ("kernels", "theta")),
    ("depthwise_dynamic_conv2d", "kernels"): ((0, 1, 2, 3), ("kernels",)),
    ("depthwise_dynamic_conv2d", "theta"): ((0,), ("theta",)),
    ("token_aware_avg_pool", "x"): ((0, 1, 2), ("weights",)), ("token_aware_avg_pool", "weights"): ((0, 1, 2), ("weights",)),
    ("attention_cross_entropy", "q"): ((0, 1, 2, 3), ("q and k", "of_q")),
    ("attention_cross_entropy", "k"): ((0, 1, 2, 3), ("q and k", "of_k")),
    ("attention_cross_entropy", "of_q"): ((0, 1, 2, 3), ("of_q", "of_k")), ("attention_cross_entropy", "of_k"): ((0, 1, 2, 3), ("of_k",)),
    ("pyramid_sparse_attention", "q"): ((0, 1, 3), ("k", "levels")),
    ("pyramid_sparse_attention", "k"): ((0, 1, 2, 3), ("k", "v", "levels")), ("pyramid_sparse_attention", "v"): ((0, 1, 2), ("v",)),
    ("pyramid_sparse_attention", "levels"): ((0, 1, 2, 3), ("levels",)),
    ("selective_scan", "u"): ((0, 1, 2), ("delta",)), ("selective_scan", "delta"): ((0, 1, 2), ("delta",)),
    ("selective_scan", "A"): ((0, 1), ("A", "B")), ("selective_scan", "B"): ((0, 1, 2, 3), ("B",)),
    ("selective_scan", "C"): ((0, 1, 2, 3), ("C",)), ("selective_scan", "D"): ((0,), ("D",)),
    ("selective_scan", "delta_bias"): ((0,), ("delta_bias",)),
    ("attention_similarity", "q"): ((0, 1, 3), ("q and k",)), ("attention_similarity", "k"): ((0, 1, 3), ("q and k",)),
}


def wrong_tensor(draw, operator, name, x, first):
    """A tensor that cannot be `name`, and what the sentence may begin with."""
    axes, named = FITTING.get((operator, name), ((), ()))
    if not x.is_floating_point():
        return wrong_integers(draw, x, axes), named
    others = () if name == first else ("device",) if name in FREE_DTYPE else ("device", "dtype")
    kind = draw(st.sampled_from(("none", "integers", "complex", "axes", "empty", *others, *["size"] * bool(axes))))
    if kind == "size":
        return torch.cat([x, x.narrow(axis := draw(st.sampled_from(axes)), 0, 1)], axis), named
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.bool, torch.uint8]))
    empty = x.narrow(draw(st.integers(min(1, x.ndim - 1), x.ndim - 1)), 0, 0)
    another = draw(st.sampled_from([x[None], x.sum(), x.reshape(1, 1, *x.shape)]))
    changed = {"none": [1.0], "integers": x.to(dtype), "complex": x.to(torch.complex64), "axes": another, "empty": empty,
               "device": x.to("meta"), "dtype": x.double()}
    return changed[kind], (name, *named) if kind == "empty" and operator == "selective_scan" else (name,)  # a length of 0 may be


def wrong_integers(draw, x, axes):
    """A tensor that cannot be the levels of blocks."""
    longer = torch.cat([x, x.narrow(axis := draw(st.sampled_from(axes)), 0, 1)], axis)
    return draw(st.sampled_from([
        x.float(), x.bool(), x.to(torch.complex64), x.tolist(), x[None], x[0], longer, x[:, :, 1:], x.to("meta"),
        torch.where(x == 0, 3, x), torch.where(x == 0, -1, x), torch.where(x == 0, 16, x)]))


@st.composite
def wrong_calls(draw, operator):
    """Arguments of which one is wrong, and the names that the sentence may begin with."""
    arguments = RIGHT[operator]()
    name = draw(st.sampled_from(sorted(arguments)))
    value, names = arguments[name], (name,)
    if isinstance(value, torch.Tensor):
        changed, names = wrong_tensor(draw, operator, name, value, next(iter(arguments)))
    elif name in LEAST:
        changed = draw(st.sampled_from([LEAST[name] - 1, -3, 1.0, 2.5, "2", None, True, math.nan, [1]]))
        if name == "regions":
            changed = draw(st.sampled_from([(changed, 2), (2, changed), 2, (2,), (1, 2, 3), None]))
        elif operator == "pyramid_sparse_attention":
            changed = draw(st.sampled_from([(changed, 16), (2, changed), 16, (16,), (2, 16, 2), None, (2, 12), (2, 4)]))
        elif operator == "deform_conv2d":
            changed = draw(st.sampled_from([changed, (changed, 1), [1, changed], (1,), (1, 1, 1)]))
    elif name == "delta_softplus":
        changed = draw(st.sampled_from([0, 1, None, "True", 1.0, torch.tensor(True), [True]]))
    else:
        changed = draw(st.sampled_from([math.nan, math.inf, -math.inf, "1", True, 1j, torch.tensor(1.0), [1.0]]))
    return arguments | {name: changed}, names


class Call:
    """Shows shapes in the place of tensors."""

    def __init__(self, given):
        self.given = given

    def __repr__(self):
        return str({name: getattr(x, "shape", x) for name, x in self.given[0].items()})


def outcome(operator, arguments, backend):
    """The sentence of an error."""
    try:
        getattr(kernels, operator)(**arguments, backend=backend)
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    raise AssertionError(f"{operator} on {backend} took {[getattr(x, 'shape', x) for x in arguments.values()]}")


@pytest.mark.parametrize("operator", RIGHT)
def test_right_arguments_run_on_every_backend(operator):
    for backend in kernels.backends(operator):
        out = getattr(kernels, operator)(**RIGHT[operator](), backend=backend)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("operator", RIGHT)
@given(data=st.data())
@settings(max_examples=60)
def test_wrong_arguments_get_the_same_sentence_on_every_backend(operator, data):
    arguments, names = data.draw(wrong_calls(operator).map(Call)).given
    sentences = {outcome(operator, arguments, backend) for backend in (None, *kernels.backends(operator))}
    assert len(sentences) == 1, sentences
    ((_, sentence),) = sentences
    assert sentence.startswith(tuple(f"{operator}: {name} must " for name in names)), sentence
    assert "\n" not in sentence and "got " in sentence


NEAR = {  # right, and almost not
    "halo_attention": [lambda: halo((0, 4, 4, 2, 3)), lambda: halo((1, 1, 1, 1, 1), 1, 0), lambda: halo((1, 1, 5, 1, 2), 3, 0, 3),
                       lambda: halo((2, 3, 2, 1, 2), 2, 3, 2), lambda: halo(scale=0.0), lambda: halo(scale=-1), lambda: halo(scale=1)],
    "deform_conv2d": [lambda: deform(0), lambda: deform(1, 1, (1, 1), 1, padding=0), lambda: deform(1, 2, (3, 3), 3, padding=0),
                      lambda: deform(1, 2, (1, 2), 3, 5, 4, 3), lambda: deform() | dict(bias=None, mask=None)],
    "depthwise_dynamic_conv2d": [
        lambda: dict(x=torch.randn(0, 3, 4, 5), kernels=torch.randn(0, 3, 3, 3), theta=torch.randn(3)),
        lambda: dict(x=torch.randn(2, 1, 1, 1), kernels=torch.randn(2, 1, 5, 1)),
        lambda: dict(x=torch.randn(1, 2, 1, 3), kernels=torch.randn(1, 2, 1, 1), theta=torch.randn(2))],
    "token_aware_avg_pool": [lambda: dict(x=torch.randn(0, 4, 5, 3), weights=torch.randn(0, 4, 5, 2)),
                             lambda: dict(x=torch.randn(1, 1, 1, 1), weights=torch.randn(1, 1, 1, 6))],
    "region_means": [lambda: dict(x=torch.randn(0, 4, 5, 3), regions=(2, 2)), lambda: dict(x=torch.randn(1, 1, 1, 1), regions=(5, 3)),
                     lambda: dict(x=torch.randn(2, 3, 4, 2), regions=[1, 4])],
    "pyramid_sparse_attention": [
        lambda: pyramid(batch=0), lambda: pyramid(1, 1, (1, 8)), lambda: pyramid(1, 1, (1, 8), 8), lambda: pyramid(3, 9, (5, 8), 8),
        lambda: pyramid(3, 9, (5, 8), 0), lambda: pyramid() | dict(scale=-1), lambda: pyramid() | dict(scale=0)],
    "selective_scan": [
        lambda: scan(0), lambda: scan(length=0), lambda: scan(1, 1, 1, 1, 1), lambda: scan(1, 3, 2, 3, 2), lambda: scan(softplus=False),
        lambda: scan(groups=1) | dict(D=None, delta_bias=None), lambda: scan() | dict(D=None)],
    "attention_similarity": [lambda: dict(q=torch.randn(1, 1, 1, 1), k=torch.randn(1, 1, 1, 1), threshold=0),
                             lambda: dict(q=torch.randn(2, 1, 3, 2), k=torch.randn(2, 1, 1, 2), scale=0)],
}
AT_LEAST_ONE = {"grouped", "positions_first"}  # samples, which they say


@pytest.mark.parametrize(("operator", "case"), [(operator, i) for operator, cases in NEAR.items() for i in range(len(cases))])
def test_backends_agree_near_the_border_with_gradients(operator, case):
    arguments = NEAR[operator][case]()
    leaves = {name: x.requires_grad_() for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    results = {}
    for backend in kernels.backends(operator):
        if backend in AT_LEAST_ONE and next(iter(leaves.values())).shape[0] == 0:
            with pytest.raises(ValueError, match="cannot run here"):
                getattr(kernels, operator)(**arguments, backend=backend)
            continue
        out = getattr(kernels, operator)(**arguments, backend=backend)
        results[backend] = out, *torch.autograd.grad(out.square().sum(), tuple(leaves.values()), allow_unused=True, materialize_grads=True)
    for backend, found in results.items():
        torch.testing.assert_close(found, results["reference"], atol=1e-4, rtol=1e-4, msg=lambda text, b=backend: f"{b}: {text}")


@pytest.mark.parametrize("operator", RIGHT)
def test_only_what_may_be_left_out_may_be_none(operator):
    arguments = RIGHT[operator]()
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in ("bias", "mask", "theta", "D", "delta_bias"):
            with pytest.raises(TypeError, match=f"^{operator}: {name} must be a tensor .*, got NoneType"):
                getattr(kernels, operator)(**arguments | {name: None})
