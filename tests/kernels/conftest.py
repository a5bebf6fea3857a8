import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where Triton kernels run: on the GPU, or on the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
