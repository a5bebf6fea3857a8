"""The selective scan in Triton, position by position: the states of a tile of channels stay in registers.

Of several positions, which are unrolled, arguments are on their way at once; the next state waits for a multiplication and an addition.
In machine code for sm_90, of 16 states in bfloat16, that takes 14.4 instructions of a warp for 32 states, and `tl.associative_scan` over
the positions of a chunk, which multiplies its way through the lanes of a warp, takes 46 or more.

The forward pass keeps one state in `CHUNK`. The backward pass goes over the chunks from the last to the first, and over each twice: once
forwards, to write down every state that STEPS positions begin with, and once backwards, a few positions at a time, whose states it holds
in registers. The gradients of B and C are sums over channels: a program adds up its own and writes them down, and nothing is added
atomically, so that all are the same again.
"""
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import name_of, register_gradient
from .._launch import Prepared, planned
from . import reference

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
CHUNK = reference.CHUNK  # positions between states that are kept
IN_A_TURN = dict.fromkeys(("selective_scan_forward", "selective_scan_backward"), ("WIDTH", "CHANNELS", "STEPS"))  # states

# A sequence or a batch of another length compiles nothing anew, as it would if 16 divided one and not the other.
kernel = triton.jit(do_not_specialize=["length", "chunks"])


@triton.jit
def _softplus(x):
    """As accurate where exp(x) is small: log(1 + e) loses what 1 + e has lost, and e / ((1 + e) - 1) makes up for it."""
    e = tl.exp2(tl.minimum(x, 20.0) * LOG2_E)
    more = 1.0 + e
    added = more - 1.0
    return tl.where(x > 20.0, x, tl.where(added == 0.0, e, tl.log2(more) * LN_2 * (e / tl.where(added == 0.0, 1.0, added))))


@triton.jit
def _within(i, count, t, length):
    """Which of i are below `count`, and none beyond the sequence."""
    return i < count * (t < length)


@triton.jit
def _at(x, t, position, there):
    """Of channels, (1, CHANNELS), or of states, (WIDTH, 1), at a position, 0 where not there."""
    return tl.load(x + t * position, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _step(raw, shift, there, SOFTPLUS: tl.constexpr):
    """δ; beyond the sequence 0, where states stay as they are."""
    step = raw + shift
    if SOFTPLUS:
        step = _softplus(step)
    return tl.where(there, step, 0.0)


@triton.jit
def _per_channel(x, channel, on):
    """Of D or delta_bias, (1, CHANNELS)."""
    return tl.load(x + channel, mask=on, other=0.0).to(tl.float32)


@kernel
def selective_scan_forward(
    u, delta, a, b, c, d, bias, y, firsts, length, chunks, channels, groups, u_batch, u_position, delta_batch, delta_position,
    a_channel, a_state, b_batch, b_group, b_position, c_batch, c_group, c_position,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):
    """One program per tile of the channels of a group, and batch. y is (B, L, D), `firsts` (B, chunks, N, D)."""
    tiles, batch = tl.cdiv(channels, CHANNELS), tl.program_id(1).to(tl.int64)
    group, of_group = tl.program_id(0) // tiles, tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    n, on, channel, every = tl.arange(0, WIDTH)[:, None], of_group < channels, group * channels + of_group, groups * channels
    u += batch * u_batch + channel
    delta += batch * delta_batch + channel
    b += batch * b_batch + group * b_group + n
    c += batch * c_batch + group * c_group + n
    y += batch * length * every + channel
    firsts += batch * chunks * STATES * every + n * every + channel
    decay = tl.load(a + channel * a_channel + n * a_state, mask=on & (n < STATES), other=0.0).to(tl.float32) * LOG2_E
    skip, shift = tl.zeros((1, CHANNELS), tl.float32), tl.zeros((1, CHANNELS), tl.float32)
    if d is not None:
        skip = _per_channel(d, channel, on)
    if bias is not None:
        shift = _per_channel(bias, channel, on)
    h = tl.zeros((WIDTH, CHANNELS), tl.float32)
    for k in range(chunks):
        tl.store(firsts + k * STATES * every, h, mask=on & (n < STATES))
        for first in range(k * CHUNK, tl.minimum((k + 1) * CHUNK, length), STEPS):
            for s in tl.static_range(STEPS):
                t = first + s
                there, listed = _within(of_group, channels, t, length), _within(n, STATES, t, length)
                x = _at(u, t, u_position, there)
                step = _step(_at(delta, t, delta_position, there), shift, there, SOFTPLUS)
                h = tl.exp2(step * decay) * h + (step * x) * _at(b, t, b_position, listed)
                read = tl.sum(h * _at(c, t, c_position, listed), 0, keep_dims=True)
                tl.store(y + t * every, read + skip * x, mask=there)


@kernel
def selective_scan_backward(
    grad, u, delta, a, b, c, d, bias, firsts, starts, grad_u, grad_delta, grad_a, grad_b, grad_c, grad_d, grad_bias,
    length, chunks, channels, groups, grad_batch, grad_position, u_batch, u_position, delta_batch, delta_position,
    a_channel, a_state, b_batch, b_group, b_position, c_batch, c_group, c_position,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):
    """As the forward kernel. grad_u and grad_delta are as y; grad_b and grad_c (tiles, B, L, G, N), grad_a (B, N, D), the others (B, D).

    `starts` is (programs, CHUNK / STEPS, WIDTH, CHANNELS), for nobody else.
    """
    tiles, batch = tl.cdiv(channels, CHANNELS), tl.program_id(1).to(tl.int64)
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    of_group = tile * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    n, on, channel, every = tl.arange(0, WIDTH)[:, None], of_group < channels, group * channels + of_group, groups * channels
    u += batch * u_batch + channel
    delta += batch * delta_batch + channel
    grad += batch * grad_batch + channel
    b += batch * b_batch + group * b_group + n
    c += batch * c_batch + group * c_group + n
    grad_u += batch * length * every + channel
    grad_delta += batch * length * every + channel
    of_states = ((tile * tl.num_programs(1) + batch) * length * groups + group) * STATES + n
    grad_b += of_states
    grad_c += of_states
    firsts += batch * chunks * STATES * every + n * every + channel
    starts += ((batch * tl.num_programs(0) + tl.program_id(0)) * (CHUNK // STEPS) * WIDTH + n) * CHANNELS
    starts += tl.arange(0, CHANNELS)[None, :]
    exists = on & (n < STATES)
    decay = tl.load(a + channel * a_channel + n * a_state, mask=exists, other=0.0).to(tl.float32) * LOG2_E
    skip, shift = tl.zeros((1, CHANNELS), tl.float32), tl.zeros((1, CHANNELS), tl.float32)
    if d is not None:
        skip = _per_channel(d, channel, on)
    if bias is not None:
        shift = _per_channel(bias, channel, on)
    behind = tl.zeros((WIDTH, CHANNELS), tl.float32)  # the derivative by a state, of what comes after its position
    sum_a = tl.zeros((WIDTH, CHANNELS), tl.float32)
    sum_d, sum_bias = tl.zeros((1, CHANNELS), tl.float32), tl.zeros((1, CHANNELS), tl.float32)
    for back in range(chunks):
        k = chunks - 1 - back
        turns = tl.cdiv(tl.minimum(CHUNK, length - k * CHUNK), STEPS)
        h = tl.load(firsts + k * STATES * every, mask=exists, other=0.0)
        for turn in range(turns):
            tl.store(starts + turn * WIDTH * CHANNELS, h)
            for s in tl.static_range(STEPS):
                t = k * CHUNK + turn * STEPS + s
                there, listed = _within(of_group, channels, t, length), _within(n, STATES, t, length)
                step = _step(_at(delta, t, delta_position, there), shift, there, SOFTPLUS)
                h = tl.exp2(step * decay) * h + (step * _at(u, t, u_position, there)) * _at(b, t, b_position, listed)
        tl.debug_barrier()  # pyright: ignore[reportAttributeAccessIssue]
        for turn_back in range(turns):
            turn = turns - 1 - turn_back
            h, before = tl.load(starts + turn * WIDTH * CHANNELS), ()
            for s in tl.static_range(STEPS):
                t = k * CHUNK + turn * STEPS + s
                there, listed = _within(of_group, channels, t, length), _within(n, STATES, t, length)
                step = _step(_at(delta, t, delta_position, there), shift, there, SOFTPLUS)
                before += (h,)
                h = tl.exp2(step * decay) * h + (step * _at(u, t, u_position, there)) * _at(b, t, b_position, listed)
            for s_back in tl.static_range(STEPS):
                t = k * CHUNK + turn * STEPS + STEPS - 1 - s_back
                there, listed = _within(of_group, channels, t, length), _within(n, STATES, t, length)
                x, above = _at(u, t, u_position, there), _at(grad, t, grad_position, there)
                raw = _at(delta, t, delta_position, there)
                step = _step(raw, shift, there, SOFTPLUS)
                by_state = behind + _at(c, t, c_position, listed) * above
                tl.store(grad_c + t * groups * STATES, tl.sum(h * above, 1, keep_dims=True), mask=listed)
                tl.store(grad_b + t * groups * STATES, tl.sum(by_state * (step * x), 1, keep_dims=True), mask=listed)
                h = before[STEPS - 1 - s_back]
                behind = by_state * tl.exp2(step * decay)
                by_exponent = behind * h
                sum_a += by_exponent * step
                by_drive = tl.sum(by_state * _at(b, t, b_position, listed), 0, keep_dims=True)
                by_step = tl.sum(by_exponent * decay, 0, keep_dims=True) * LN_2 + by_drive * x
                if SOFTPLUS:
                    by_step *= tl.sigmoid(raw + shift)
                tl.store(grad_u + t * every, by_drive * step + skip * above, mask=there)
                tl.store(grad_delta + t * every, by_step, mask=there)
                sum_d += above * x
                sum_bias += by_step
        tl.debug_barrier()  # pyright: ignore[reportAttributeAccessIssue]
    tl.store(grad_a + batch * STATES * every + n * every + channel, sum_a, mask=exists)
    if d is not None:
        tl.store(grad_d + batch * every + channel, sum_d, mask=on)
    if bias is not None:
        tl.store(grad_bias + batch * every + channel, sum_bias, mask=on)


def _channels_innermost(x: Tensor) -> Tensor:
    """(B, D, L) or (B, G, N, L), copied where channels or states do not lie side by side."""
    return x if x.stride(-2) == 1 else x.movedim(-1, 1).contiguous().movedim(1, -1)


def _numbers(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_softplus: bool) -> dict[str, Any]:
    """What both kernels are launched with, beside tensors."""
    (_, channels, length), (groups, states) = u.shape, B.shape[1:3]
    return dict(
        length=length, chunks=triton.cdiv(length, CHUNK), channels=channels // groups, groups=groups, SOFTPLUS=delta_softplus,
        STATES=states, WIDTH=triton.next_power_of_2(states), CHUNK=CHUNK, a_channel=A.stride(0), a_state=A.stride(1), **_strides("u", u),
        **_strides("delta", delta), **_strides("b", B), **_strides("c", C))


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """Of (B, D, L), or of (B, G, N, L), whose last but one is 1."""
    return {f"{name}_batch": x.stride(0), f"{name}_position": x.stride(-1)} | ({f"{name}_group": x.stride(1)} if x.ndim == 4 else {})


def _grid(u: Tensor, groups: int) -> Callable[[dict[str, int]], tuple[int, ...]]:
    batch, channels, _ = u.shape
    return lambda chosen: (groups * triton.cdiv(channels // groups, chosen["CHANNELS"]), batch)


def _key(u: Tensor, A: Tensor) -> str:
    width = triton.next_power_of_2(A.shape[1])
    return f"states{width} {8 * u.itemsize}-bit {width}"


@planned
def _scanning(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_softplus: bool) -> Prepared:
    return Prepared(
        selective_scan_forward, u.device, _grid(u, B.shape[1]), _key(u, A), ("u", "delta", "a", "b", "c", "d", "bias", "y", "firsts"),
        **_numbers(u, delta, A, B, C, delta_softplus))


@planned
def _unscanning(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_softplus: bool
) -> tuple[Prepared, int, tuple[int, ...]]:
    """Also how many tiles a group has, and the shape of the states that STEPS positions begin with."""
    prepared = Prepared(
        selective_scan_backward, u.device, _grid(u, B.shape[1]), _key(u, A),
        ("grad", "u", "delta", "a", "b", "c", "d", "bias", "firsts", "starts", "grad_u", "grad_delta", "grad_a", "grad_b", "grad_c",
         "grad_d", "grad_bias"), **_strides("grad", grad), **_numbers(u, delta, A, B, C, delta_softplus))
    chosen, (programs, batch) = prepared.configuration, prepared._grid[:2]
    return (prepared, programs // B.shape[1],
            (batch * programs, CHUNK // chosen["STEPS"], triton.next_power_of_2(A.shape[1]), chosen["CHANNELS"]))


def _empty_results(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """y, in memory with channels innermost, and the first states of the chunks."""
    batch, channels, length = u.shape
    return (u.new_empty(batch, length, channels).transpose(1, 2),
            u.new_empty(batch, (length + CHUNK - 1) // CHUNK, A.shape[1], channels, dtype=torch.float32))


@torch.library.custom_op("zoo::selective_scan_triton", mutates_args=())
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.selective_scan`. Also the first state of every chunk, (B, chunks, N, D)."""
    y, firsts = _empty_results(u, A)
    if y.numel():
        u, delta, B, C = map(_channels_innermost, (u, delta, B, C))
        D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
        _scanning(u, delta, A, B, C, delta_softplus)(u, delta, A, B, C, D, delta_bias, y, firsts)
    return y, firsts


@selective_scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    return _empty_results(u, A)


@torch.library.custom_op("zoo::selective_scan_triton_backward", mutates_args=())
def gradients(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, firsts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all seven."""
    results = _empty_gradients(u, delta, A, B, C, D, delta_bias)
    if u.numel() == 0:
        return tuple(x.zero_() for x in results)  # pyright: ignore[reportReturnType]
    (batch, channels, length), (groups, states) = u.shape, B.shape[1:3]
    grad, u, delta, B, C = map(_channels_innermost, (grad, u, delta, B, C))
    D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
    run, tiles, of_starts = _unscanning(grad, u, delta, A, B, C, delta_softplus)
    starts, of_states, of_a, of_channels = (u.new_empty(shape, dtype=torch.float32) for shape in (
        of_starts, (2, tiles, batch, length, groups, states), (batch, states, channels), (2, batch, channels)))
    run(grad, u, delta, A, B, C, D, delta_bias, firsts, starts, *results[:2], of_a, *of_states, *of_channels)
    grad_b, grad_c = (of_states.sum(1) if tiles > 1 else of_states[:, 0]).permute(0, 1, 3, 4, 2)
    grad_d, grad_bias = of_channels.sum(1)
    results[2].copy_(of_a.sum(0).t())
    for result, x in zip(results[3:], (grad_b, grad_c, grad_d, grad_bias), strict=True):
        if result.numel():
            result.copy_(x)
    return results


def _empty_gradients(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    of_a, of_b, of_c, of_d, of_bias = (
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (A, B, C, D, delta_bias))
    of_u, of_delta = (x.new_empty(batch, length, channels).transpose(1, 2) for x in (u, delta))
    return of_u, of_delta, of_a, of_b, of_c, of_d, of_bias


@gradients.register_fake
def _(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, firsts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(u, delta, A, B, C, D, delta_bias)


call = register_gradient(selective_scan, gradients, reference.selective_scan, reference.flops, kept=(1,))


def compiled_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled as proof: a name, and a call that launches kernels."""
    for dtype, states in ((torch.bfloat16, 16), (torch.float32, 16), (torch.bfloat16, 1), (torch.bfloat16, 32), (torch.float32, 32)):
        u = torch.zeros(2, 50, 384, dtype=dtype).transpose(1, 2)
        b = torch.zeros(2, 50, 4, states, dtype=dtype).permute(0, 2, 3, 1)
        a, d = -torch.ones(384, states), torch.zeros(384)

        def run(u=u, b=b, a=a, d=d) -> None:
            _, firsts = selective_scan(u, u, a, b, b, d, d, True)
            gradients(u, u, u, a, b, b, d, d, True, firsts)

        yield f"{states} states {name_of(dtype)}", run
