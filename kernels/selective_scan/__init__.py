from torch import Tensor

from .._backends import choose, observed, public_operator, remembered
from .._checking import check_tensors
from . import _looped, recomputed, reference

__all__ = ["selective_scan"]


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
        backend: "reference" (in chunks of positions), "pytorch", see `zoo.kernels`.

    Returns:
        (B, D, L) in the dtype of u. Differentiable any number of times in all seven.

    Names and order are those of `selective_scan_fn` (state-spaces/mamba, mamba_ssm/ops/selective_scan_interface.py), which also has a
    gate z, complex A, and B and C without groups or positions.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    arguments = u, delta, A, B, C, D, delta_bias, delta_softplus
    seen = observed((*arguments, backend))
    chosen = _chosen(seen, *arguments, backend)
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
    return choose("selective_scan", backend, u, lambda: "recomputed", "looped")
