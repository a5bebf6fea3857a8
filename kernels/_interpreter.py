import functools


@functools.cache
def correct_products() -> None:
    """Lets Triton's interpreter multiply matrices of bfloat16: by itself it multiplies their bits as if they were whole numbers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def create_dot_of_numbers(builder, a, b, *rest):
        a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(builder, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot_of_numbers  # pyright: ignore[reportAttributeAccessIssue]  # whatever comes after a and b
