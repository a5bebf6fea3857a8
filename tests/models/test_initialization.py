"""The first value of every parameter of every family is drawn as its authors draw it.

Sources, all read: models/biformer.py and ops/bra_legacy.py of rayleizhu/BiFormer; classification/models/{litv2,blocks}.py and
mm_modules/DCN of ziplab/LITv2; models/AttNet.py of price112/Attentive-Convolution; models/{fan,convnext_utils}.py of NVlabs/FAN and
TAPADL_FAN/models/fan.py of guoyongcs/TAPADL; classification/models/imagenet/resnet_sk.py of implus/PytorchInsight;
MoH-ViT/{transnext,attention,attention_native}.py of SkyworkAI/MoH; semantic-segmentation/network/PSA.py of DeLightCMU/PSA;
models/networks_other.py and models/networks/unet_CT_multi_att_dsv_3D.py of ozan-oktay/Attention-Gated-Networks; vision_models.py,
relational_attention.py and symbol_retrieval.py of dual-attention 0.0.7 (PyPI); code/model/aan.py of haoyuc/A2N; src/model/{han,common}.py
of wwlCape/HAN; lib/modules of plemeri/InSPyReNet; net/models/vmamba.py of Arhosseini77/SUM.
HaloNet, DAS and context broadcasting have no code of
their authors.
"""
import math
import re

import pytest
import timm
import torch
from torch import nn

import zoo  # noqa: F401  registers the models
from zoo.models.fan import Fan
from zoo.models.sknet import sk_resnet50

ONE, ZERO = ("=", 1.0), ("=", 0.0)


def fan_in(weight: torch.Tensor, conv: nn.Module) -> int:
    return weight[0].numel()


def fan_out(weight: torch.Tensor, conv: nn.Module) -> int:
    return weight[0, 0].numel() * len(weight) // conv.groups


RULES = {  # what is drawn: the deviation around the mean 0 (or another), of a weight and the module that it is of
    "truncated": lambda weight, module: 0.02,
    "fan out": lambda weight, module: math.sqrt(2 / fan_out(weight, module)),
    "fan out, groups not counted": lambda weight, module: math.sqrt(2 / (weight[0, 0].numel() * len(weight))),
    "fan in": lambda weight, module: math.sqrt(2 / fan_in(weight, module)),
    "torch": lambda weight, module: 1 / math.sqrt(3 * fan_in(weight, module)),  # uniform, of torch's layers
    "torch, of the weight": lambda bias, module: 1 / math.sqrt(3 * fan_in(module.weight, module)),
    "by the last axis": lambda weight, module: 1 / math.sqrt(3 * weight.shape[-1]),  # of linear layers, one for each order
    "local bias": lambda weight, module: 0.0004,
    "around 1": lambda weight, module: 0.02,
    "normal": lambda weight, module: 1.0,
}
NORMS = [(r"norm\w*(\.\d)?\.weight$|bn\w*\.weight$", ONE), (r"norm\w*(\.\d)?\.bias$|bn\w*\.bias$", ZERO)]
CONVS = [(r"weight$", "torch"), (r"bias$", "torch, of the weight")]
LOGARITHMS = tuple(torch.arange(1, 5).float().log().tolist())  # of 1 to the nano's number of states
SCANS = [(r"A_logs$", ("=", LOGARITHMS)), (r"Ds$", ONE), (r"x_proj_weight$|dt_projs_weight$", "by the last axis"),
         (r"dt_projs_bias$", None)]  # the last in tests/layers/test_selective_scan_2d.py
TABLE = {  # by family: patterns of names, the first that fits counts
    "biformer_nano": [*NORMS, (r"(qkv|proj|fc\d?)\.weight$", "truncated"), (r"(qkv|proj|fc\d?)\.bias$", ZERO), *CONVS],
    "litv2_nano": [*NORMS, (r"offset", ZERO), (r"dwconv\.weight", "fan out"), (r"dwconv\.bias", ZERO),
                   (r"(qkv|lo_q|lo_kv|hi_proj|lo_proj|fc\d?)\.weight$", "truncated"), (r"(qkv|_q|_kv|_proj|fc\d?)\.bias$", ZERO), *CONVS],
    "moh_transnext_nano": [*NORMS, (r"temperature", ("=", math.log(math.expm1(1 / 0.24)))), (r"learnable_bias", ZERO),
                           (r"relative_pos_bias_local", "local bias"), (r"query_embedding|learnable_tokens", "truncated"),
                           (r"(^stem|downsample)\.proj\.weight|dwconv\.weight|attn\.sr\.weight", "fan out"),
                           (r"weight$", "truncated"), (r"bias$", ZERO)],
    "attnet_nano": [*NORMS, (r"difference_control", ZERO), (r"weight$", "truncated"), (r"bias$", ZERO)],
    "tap_fan_nano": [*NORMS, (r"gamma\d?$|temperature", ONE), (r"cls_token", "truncated"), (r"pool\.conv\d\.weight", "fan out"),
                     (r"dwconv\.conv\d\.weight", "fan out"), (r"dwconv\.conv\d\.bias", ZERO),
                     (r"pos_embed|^stem|^stages\.[01]\.|downsample\.conv", "convolutions"),
                     (r"weight$", "truncated"), (r"bias$", ZERO)],
    "fan_hybrid": [*NORMS, (r"downsample\.0\.weight", ONE),
                   (r"stages\.[01]\..*gamma$", ("=", 1e-6)), (r"gamma\d?$|temperature", ONE), (r"cls_token", "truncated"),
                   (r"dwconv\.conv\d\.weight", "fan out"), (r"dwconv\.conv\d\.bias", ZERO),
                   (r"pos_embed|stages\.2\.downsample", "convolutions"), (r"weight$", "truncated"), (r"bias$", ZERO)],
    "sk_resnet50": [*NORMS, (r"downsample\.1\.weight", ONE), (r"downsample\.1\.bias", ZERO), (r"^fc", "convolutions"),
                    (r"weight$", "fan out, groups not counted")],
    "vidat_nano_patch16_224": [*NORMS, (r"pos_embed|cls_token|template_features|symbol_library", "normal"), (r"wr$", "torch"), *CONVS],
    "polarized_resnet_nano": [(r"aa\.(channel_query|channel_value|spatial_query|spatial_value)\.weight", "fan in"),
                              (r"aa\.channel_up\.1\.weight", ONE), (r"aa\.channel_up\.1\.bias", ZERO), (r"aa\.", "convolutions"),
                              (r".", None)],  # the rest is timm's ResNet
    "vmamba_nano_v0": [*NORMS, *SCANS, (r"^stem\.proj|conv2d", "convolutions"), (r"weight$", "truncated"), (r"bias$", ZERO)],
    "sum_nano": [*NORMS, *SCANS, (r"\.condition$", "normal"), (r"stem\.proj|conv2d|^head", "convolutions"), (r"weight$", "truncated"),
                 (r"bias$", ZERO)],
    "a2n_nano_x2": CONVS,
    "han_nano_x2": [(r"gamma$", ZERO), *CONVS],
    "inspyrenet_nano": [(r"^backbone", None), *NORMS, (r"gamma$", ZERO), (r"threshold$", ("=", 0.5)), (r"weight$", "fan in")],
    "dconnnet_nano": [(r"^encoder", None), (r"^ups\.\d\.\w+\.norm\.weight", "around 1"), (r"^ups\..*conv\.weight", "fan in"), *NORMS,
                      (r"gamma$", ZERO), *CONVS],
    "attention_unet3d_nano": [(r"norm\d?\.weight", "around 1"), (r"norm\d?\.bias", ZERO), (r"weight$", "fan in"),
                              (r"bias$", "torch, of the weight")],
}
MAKE = {
    "fan_hybrid": lambda: Fan(embed_dim=96, depth=2, num_heads=4, hybrid_dims=(32, 64), hybrid_depths=(1, 1)),
    "sk_resnet50": lambda: sk_resnet50(layers=(1, 1, 1, 1), channels=(32, 32, 64, 64)),
}


def expected(rules: list[tuple[str, object]], name: str) -> object:
    rule = next(rule for pattern, rule in rules if re.search(pattern, name))
    return ("torch" if name.endswith("weight") else "torch, of the weight") if rule == "convolutions" else rule


@pytest.mark.parametrize("family", TABLE)
def test_first_values_are_the_authors(family):
    torch.manual_seed(1)
    model = MAKE.get(family, lambda: timm.create_model(family))()
    seen = set()
    for name, value in model.named_parameters():
        rule = expected(TABLE[family], name)
        seen.add(rule)
        if rule is None:
            continue
        value = value.detach().double()
        if isinstance(rule, tuple):
            assert (value == torch.tensor(rule[1]).double()).all(), f"{name} is not {rule[1]}"
            continue
        deviation, mean = RULES[rule](value, model.get_submodule(name.rpartition(".")[0])), float(rule == "around 1")
        error = 5 * deviation / math.sqrt(value.numel())
        assert abs(value.mean() - mean) < error, f"{name}: mean {value.mean():.3g}, where {mean} is the authors'"
        if value.numel() > 8:
            found = (value - mean).square().mean().sqrt()
            assert abs(found - deviation) < error, f"{name}: deviation {found:.4g}, where {deviation:.4g} is the authors' ({rule})"
    assert len(seen) > 1
