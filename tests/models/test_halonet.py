import sys

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo

PAPER = {  # millions of parameters, billions of multiply-adds
    "halonet_h0_256": (5.5, 2.4), "halonet_h1_256": (8.1, 3.0), "halonet_h2_256": (9.4, 3.4), "halonet_h3_320": (11.8, 6.3),
    "halonet_h4_384": (19.1, 12.2), "halonet_h5_448": (30.7, 32.6), "halonet_h6_512": (43.4, 53.2), "halonet_h7_600": (67.4, 119.6),
}


def test_every_model_of_the_paper_is_there():
    assert set(zoo.list_models("halonet_h*")) == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_size(name, monkeypatch):
    """On the meta device: shapes only."""
    operator = sys.modules["zoo.kernels.halo_attention"]
    monkeypatch.setattr(operator.blocked, "halo_attention", operator.reference.halo_attention)
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        image = torch.zeros(1, *model.pretrained_cfg["input_size"])
    assert image.shape[-1] == int(name.rsplit("_")[-1])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    params, macs = PAPER[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=0.005)
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.08)
