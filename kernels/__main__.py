"""Says which backend runs for which operator and dtype on this machine, and why."""
import itertools

import torch

from ._backends import BACKENDS, DTYPES, name_of, obstacle


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no CUDA or HIP device"
    lines = [f"torch {torch.__version__}, {name}"]
    for operator, backends in BACKENDS.items():
        choices = [(_choice(operator, device, dtype), name_of(dtype)) for dtype in (*DTYPES, torch.float64)]
        for (backend, reason), group in itertools.groupby(choices, key=lambda choice: choice[0]):
            lines.append(f"{operator}, {', '.join(dtype for _, dtype in group)}: {backend}, {reason}")
        lines.append(f"{operator} can be asked for {', '.join(backends)}")
    return "\n".join(lines)


def _choice(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if "triton" not in BACKENDS[operator]:
        return "pytorch", "as it has no Triton kernels"
    reason = obstacle(device, dtype)
    if reason is not None:
        return "pytorch", f"because {reason}"
    if device.type == "cpu":
        return "pytorch", "unless asked for 'triton', which runs in Triton's interpreter"
    return "triton", "where the operator's docstring does not exclude the arguments"


if __name__ == "__main__":
    print(describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
