import torch


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which torch 2.11 takes for true in every compilation too."""
    return torch.compiler.is_exporting()
