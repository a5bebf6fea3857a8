"""VMamba with scans written position by position, as the reference of state-spaces/mamba has them, which needs no CUDA extension either.

    python -m benchmarks.vmamba_sequential

writes vmamba.md beside it: a layer and a network against `zoo.layers.SelectiveScan2d`, with the same weights.
"""
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo  # noqa: F401  registers the models
from zoo.layers import SelectiveScan2d
from zoo.measuring.model_benchmark import PASSES, Report, compare, facts
from zoo.tools._cli import run

PAGE = Path(__file__).with_suffix("").parent / "vmamba.md"
CASES = {"`SelectiveScan2d(96)`, 28×28": ("layer", 28), "`vmamba_nano_v0`, 64×64": ("nano", 64)}
ROUNDS = 3
HEAD = """# VMamba beside scans written position by position

`python -m benchmarks.vmamba_sequential`: the same layers with the same weights, but the scan is the loop over positions that people have
who cannot build the CUDA extension (the reference of [state-spaces/mamba](https://github.com/state-spaces/mamba) is such a loop), whose
factors of all positions are made beforehand. The largest difference of the answers is {difference:.1e}.
Times are the processor's, of one thread; the machine did other work beside it.

{table}
"""


class Sequential(nn.Module):
    """SS2D in plain PyTorch: (B, H, W, C) → the same shape, without modulation."""

    def __init__(self, ours: SelectiveScan2d):
        super().__init__()
        self.own = ours  # its weights

    def forward(self, x: Tensor) -> Tensor:
        own = self.own
        batch, height, width, _ = x.shape
        a, z = own.in_proj(x).chunk(2, -1)
        u = F.silu(own.conv2d(a.permute(0, 3, 1, 2)))
        two = torch.stack([u.flatten(2), u.transpose(2, 3).flatten(2)], 1)
        sequences = torch.cat([two, two.flip(-1)], 1)
        d, b, c = torch.einsum("bkel,kre->bkrl", sequences, own.x_proj_weight).split((own.step_dim, own.state_dim, own.state_dim), 2)
        steps = F.softplus(torch.einsum("bkrl,ker->bkel", d, own.dt_projs_weight) + own.dt_projs_bias[:, :, None])
        rates = -own.A_logs.exp().unflatten(0, (4, -1))
        decay = torch.einsum("bkel,ken->bkeln", steps, rates).exp()
        drive = torch.einsum("bkel,bknl,bkel->bkeln", steps, b, sequences)
        state, out = torch.zeros_like(drive[..., 0, :]), []
        for decayed, driven, read in zip(decay.unbind(-2), drive.unbind(-2), c.unbind(-1), strict=True):
            state = decayed * state + driven
            out.append(torch.einsum("bken,bkn->bke", state, read))
        y = torch.stack(out, -1) + sequences * own.Ds.unflatten(0, (4, -1))[..., None]
        y = torch.stack([y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)], 1)
        y = y[:, 0].unflatten(-1, (height, width)) + y[:, 1].unflatten(-1, (width, height)).transpose(2, 3)
        return own.out_proj(own.out_norm(y.permute(0, 2, 3, 1)) * F.silu(z))


def build(name: str) -> nn.Module:
    """The rival of `zoo benchmark`: a model of the zoo with these layers."""
    model = timm.create_model(name)
    for module in list(model.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, SelectiveScan2d):
                setattr(module, child, Sequential(layer))
    return model


def pair(kind: str, side: int) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "layer":
        layer = SelectiveScan2d(96)
        return layer, Sequential(layer), torch.randn(1, side, side, 96)
    ours, rival = timm.create_model("vmamba_nano_v0"), build("vmamba_nano_v0")
    rival.load_state_dict({name.replace(".attn.", ".attn.own."): value for name, value in ours.state_dict().items()})
    return ours, rival, torch.randn(1, 3, side, side)


def main() -> None:
    torch.set_num_threads(1)
    compared, differences = [], []
    for label, (kind, side) in CASES.items():
        ours, rival, x = pair(kind, side)
        with torch.no_grad():
            differences.append((ours(x) - rival(x)).abs().max().item())
        compared += [compare(label, name, ours, rival, x, ROUNDS, time.process_time) for name in PASSES]
        print(label, differences[-1], *(comparison.ratios for comparison in compared[-2:]), flush=True)
    told = facts(1, {"all": "as in the table"}, "float32", ROUNDS, "cpu", True)
    PAGE.write_text(HEAD.format(difference=max(differences), table=Report(told, compared).markdown()))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    run(main)
