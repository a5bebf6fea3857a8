"""Triton's interpreter: whether it runs here, and what it has to be told."""
import functools
from importlib.metadata import version

SCALARS = (3, 7), (2, 4)  # Triton before the former takes arrays for numbers, which numpy refuses from the latter on


def obstacle() -> str | None:
    """Why the interpreter cannot run with what is installed, as a clause; None where it can."""
    triton, numpy = (tuple(map(int, version(package).split(".")[:2])) for package in ("triton", "numpy"))
    if triton >= SCALARS[0] or numpy < SCALARS[1]:
        return None
    return f"the interpreter of Triton {version('triton')} needs numpy below 2.4, but numpy is {version('numpy')}"


@functools.cache
def correct_products() -> None:
    """Lets Triton's interpreter multiply matrices of bfloat16: by itself it multiplies their bits as if they were whole numbers.

    Raises:
        RuntimeError: the interpreter cannot run with this numpy.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    if (reason := obstacle()) is not None:
        raise RuntimeError(f"zoo.kernels: {reason}")
    create_dot = InterpreterBuilder.create_dot

    def create_dot_of_numbers(builder, a, b, *rest):
        a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(builder, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot_of_numbers  # pyright: ignore[reportAttributeAccessIssue]  # whatever comes after a and b
