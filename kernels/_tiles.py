"""What kernels share: how they are compiled, and for attention rows of heads, read and written, and the products of rows."""
import triton
import triton.language as tl

# A map of another size, or a batch of another number of samples, compiles nothing anew, as it would if 16 divided one and not the other.
kernel = triton.jit(do_not_specialize=[
    "images", "samples", "height", "width", "h", "w", "rows", "columns",
    "kv_height", "kv_width", "kv_h", "kv_w", "q_height", "q_width", "out_height", "out_width",
])


@triton.jit
def load_rows(x, position, on, stride_position, stride_channel, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Rows of one head: (positions, TILE), 0 where not on and beyond WIDTH."""
    c = tl.arange(0, TILE)
    mask = on[:, None] if WIDTH == TILE else on[:, None] & (c < WIDTH)
    return tl.load(x + position[:, None] * stride_position + c * stride_channel, mask=mask, other=0.0)


@triton.jit
def store_rows(x, value, position, on, stride_position, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Writes `value` (positions, TILE) where `load_rows` would read it, channels one by one."""
    c = tl.arange(0, TILE)
    mask = on[:, None] if WIDTH == TILE else on[:, None] & (c < WIDTH)
    tl.store(x + position[:, None] * stride_position + c, value, mask=mask)


@triton.jit
def products(held, others, PRECISION: tl.constexpr):
    """held othersᵀ, where `held` is the same in every turn of a loop.

    In float32 `held` is the second factor, of which each warp keeps a part; of the first, each keeps all, in registers.
    """
    if held.dtype == tl.float32:
        return tl.trans(tl.dot(others, tl.trans(held), input_precision=PRECISION))
    return tl.dot(held, tl.trans(others), input_precision=PRECISION)
