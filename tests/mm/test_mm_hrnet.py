"""HRNet as mmsegmentation and the authors of PSA build it, whose weights are trained with bilinear fusion."""
import pytest
import torch
from timm.models.hrnet import cfg_cls
from torch import nn

from zoo.models.polarized import PolarizedHRNet

pytest.importorskip("mmseg", reason="needs mmsegmentation: make mm")


def stages(cfg) -> dict[str, dict]:
    names = dict(num_modules="num_modules", num_branches="num_branches", block_type="block", num_blocks="num_blocks",
                 num_channels="num_channels")
    found = {f"stage{i}": {theirs: getattr(getattr(cfg, f"stage{i}"), ours) for ours, theirs in names.items()} for i in (1, 2, 3, 4)}
    return {name: stage | {"block": stage["block"].upper()} for name, stage in found.items()}


@pytest.mark.parametrize("size", [(64, 96), (75, 53)])
def test_features_are_those_of_the_toolbox(size):
    from mmseg.models.backbones import HRNet

    torch.manual_seed(0)
    theirs = HRNet(stages(cfg_cls["hrnet_w18_small"]), norm_eval=False).double().eval()
    ours = PolarizedHRNet(cfg_cls["hrnet_w18_small"], head="", fuse="bilinear").double().eval()
    for module in ours.modules():
        if hasattr(module, "aa"):
            module.aa = nn.Identity()
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if value.ndim == 1:
                value.uniform_(0.3, 0.9) if not name.endswith("bias") else value.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x)
        for nearest in (False, True):
            if nearest:
                for module in ours.modules():
                    module.fuse = "nearest"
            errors = [float((mine - their).norm() / their.norm()) for mine, their in zip(ours.forward_features(x), expected, strict=True)]
            assert max(errors) > 0.01 if nearest else max(errors) < 1e-12
