from torch import Tensor

from .._backends import choose, observed, public_operator, remembered
from .._checking import check_tensors
from .._layout import span, too_large
from . import _looped, recomputed, reference

__all__ = ["selective_scan"]

MOST_STATES = 32  # of a channel, that the Triton kernels take


@public_operator
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A state for every channel, driven by a sequence and read along it, as much as the sequence itself says (arXiv 2312.00752, section 3).

        h_t = exp(δ_t A) h_{t-1} + δ_t u_t B_t,  y_t = C_t·h_t + D u_t,  h_{-1} = 0
        δ = delta + delta_bias,  or δ = softplus(delta + delta_bias) with delta_softplus

    Args:
        u: (B, D, L), L at least 0. float32, float64, float16, bfloat16; computed in at least float32.
        delta: (B, D, L) of the same dtype (under autocast: of any).
        A: (D, N) of any floating dtype, negative where states are to fade.
        B, C: (B, G, N, L) of the dtype of u; channel i belongs to group ⌊i / (D / G)⌋, G divides D.
        D: (D,) or None; delta_bias: (D,) or None; of any floating dtype.
        backend: "reference" (in chunks of 64 positions, all of a chunk at once), "recomputed" or "pytorch" (the states of a chunk again in
            the backward pass), "triton"; default what suits the device, see `zoo.kernels`. The kernels take at most 32 states of a channel.

    Returns:
        (B, D, L) in the dtype of u. Differentiable any number of times in all seven.

    The states of all positions are D·N·L numbers and never held at once: beyond the arguments, training keeps one state in 64, in at
    least float32. With the reference, autograd keeps six times D·N·L. Nothing is divided by products of exp(δ A), which vanish. The
    kernels read channels, and of B and C states, side by side, as in `x.transpose(1, 2)` of a contiguous (B, L, D), and copy what lies
    otherwise; their gradients are summed in a fixed order. Exported graphs hold one loop over positions, ONNX's Scan, and take any
    length. FLOP counters count products of matrices, of which there is none.

    Names and order are those of `selective_scan_fn` (state-spaces/mamba, mamba_ssm/ops/selective_scan_interface.py), which also has a
    gate z, complex A, and B and C without groups or positions.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    arguments = u, delta, A, B, C, D, delta_bias, delta_softplus
    seen = observed((*arguments, backend))
    chosen = _chosen(seen, *arguments, backend)
    if chosen == "triton":
        from . import triton
        return triton.call(seen, *arguments)[0]
    return {"reference": reference, "recomputed": recomputed, "looped": _looped}[chosen].selective_scan(*arguments)


@remembered
def _chosen(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
    backend: str | None,
) -> str:
    check_tensors(
        "selective_scan", ("A", "D", "delta_bias"), True, ("B", "L"), u=(u, "B, D, L"), delta=(delta, "B, D, L"), A=(A, "D, N"),
        B=(B, "B, G, N, L"), C=(C, "B, G, N, L"), D=(D, "D?"), delta_bias=(delta_bias, "D?"))
    (batch, channels, length), states, groups = u.shape, A.shape[1], B.shape[1]
    if delta.shape != u.shape:
        raise ValueError(f"selective_scan: delta must have the shape of u, {tuple(u.shape)}, got {tuple(delta.shape)}")
    for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        if x is not None and x.shape[0] != channels:
            axes = "D, N" if name == "A" else "D,"
            raise ValueError(f"selective_scan: {name} must be ({axes}) with the {channels} channels of u, got {tuple(x.shape)}")
    if B.shape != (batch, groups, states, length) or channels % groups:
        raise ValueError(f"selective_scan: B must be (B, G, N, L) = ({batch}, G, {states}, {length}) with a G that divides the {channels} "
                         f"channels of u, got {tuple(B.shape)}")
    if C.shape != B.shape:
        raise ValueError(f"selective_scan: C must have the shape of B, {tuple(B.shape)}, got {tuple(C.shape)}")
    if not isinstance(delta_softplus, bool):
        raise TypeError(f"selective_scan: delta_softplus must be True or False, got {delta_softplus!r}")
    return choose("selective_scan", backend, u, lambda: "recomputed", "looped", {"triton": lambda: _unsupported(u, delta, B, C)})


def _unsupported(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> str | None:
    """What the kernels cannot do, as a clause."""
    if (states := B.shape[2]) > MOST_STATES:
        return f"the kernels take at most {MOST_STATES} states of a channel, not {states}"
    chunks = (u.shape[2] + reference.CHUNK - 1) // reference.CHUNK
    return too_large(*map(span, (u, delta, B, C)), u.shape[1] * u.shape[2], u.shape[1] * states * chunks)
