import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where Triton kernels run: on the GPU, or on the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def bfloat16_products():
    """Triton's interpreter multiplies matrices of bfloat16 as if their bits were integers; here it widens them first."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        return create_dot(self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", widened)
        yield
