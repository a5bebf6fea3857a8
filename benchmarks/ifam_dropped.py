"""What it saves iFAM to leave masked patches out of its second stage, beside hiding them.

    python -m benchmarks.ifam_dropped > benchmarks/ifam_dropped.md
"""
import copy
import time
from typing import Any

import timm
import torch
from torch import Tensor, nn

from zoo.measuring.model_benchmark import PASSES, Report, compare, facts

NAME, SIZE, BATCH, ROUNDS = "ifam_base_patch14_reg4_dinov2", 224, 4, 7
HEAD = """# iFAM with and without its masked patches

`python -m benchmarks.ifam_dropped`: `{name}` with random weights and `drop_masked=True` (ours), beside
itself with masked patches hidden from attention (rival). A share of the patches is marked as visible, the same of every image, or, in
*uneven*, as much of one image and a quarter as much of the others: all run with as many as the fullest. Answers differ by at most
{difference:.0e} of the largest. The first stage, half of the network, sees all patches either way.

{table}"""


class Marked(nn.Module):
    """The network where the first `visible` patches of each image are parts."""

    def __init__(self, model: Any, visible: list[int], drop: bool):
        super().__init__()
        self.model, self.visible, self.model.drop_masked = model, visible, drop

    def forward(self, x: Tensor) -> Tensor:
        parts, _ = self.model.discover(x)
        places = torch.arange(parts.mask[0].numel()).view(parts.mask.shape[1:])
        mask = torch.stack([(places < count).to(x.dtype) for count in self.visible])
        return self.model.forward_head(self.model._stage_2(x, parts._replace(mask=mask))[0])


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model, images = timm.create_model(NAME).eval(), torch.randn(BATCH, 3, SIZE, SIZE)
    patches, comparisons, differences = (SIZE // 14) ** 2, [], []
    for said, counts in {
        "75 % visible": [patches * 3 // 4] * BATCH, "50 %": [patches // 2] * BATCH, "25 %": [patches // 4] * BATCH,
        "uneven, 50 %": [patches // 2, *[patches // 8] * (BATCH - 1)],
    }.items():
        ours, rival = Marked(model, counts, True), Marked(copy.deepcopy(model), counts, False)
        with torch.no_grad():
            expected = rival(images)
            differences.append(((ours(images) - expected).abs().max() / expected.abs().max()).item())
        comparisons.append(compare(said, PASSES[0], ours, rival, images, ROUNDS, time.perf_counter))
    report = Report(facts(BATCH, {NAME: f"{SIZE}x{SIZE}"}, "float32", ROUNDS, "cpu", True), comparisons)
    print(HEAD.format(name=NAME, difference=max(differences), table=report.markdown()))


if __name__ == "__main__":
    main()
