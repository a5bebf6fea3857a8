"""HRNet as mmsegmentation and the authors of PSA build it, whose weights are trained with bilinear fusion."""
import pytest
import torch
from timm.models.hrnet import cfg_cls
from torch import nn

from zoo.models.polarized import PolarizedHRNet

pytest.importorskip("mmseg", reason="needs mmsegmentation: make mm")


def stages(cfg: dict) -> dict[str, dict]:
    """timm's description in the toolbox's words."""
    found = {name: dict(stage, block=stage["block_type"]) for name, stage in cfg.items() if name.startswith("stage")}
    for stage in found.values():
        del stage["block_type"], stage["fuse_method"]
    return found


# Of other sizes the toolbox interpolates twice, by a factor and to the size; the authors of PSA do it once.
@pytest.mark.parametrize("size", [(64, 96), (96, 32)])
def test_features_are_those_of_the_toolbox(size):
    from mmseg.models.backbones import HRNet

    torch.manual_seed(0)
    theirs = HRNet(stages(cfg_cls["hrnet_w18_small"]), norm_eval=False).double()
    theirs.eval()  # returns nothing
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
