"""The files that the authors released, by the names of our models: where, under what licence, and which of their weights were evaluated.

Weights are never part of the project. `downloads.fetch` gets what has a direct address, which a model's registered config holds
(`url`, `license`); for what lies on a drive there is the page. Read from the authors' repositories in November 2026; docs/cards/ shows it.
"""
from dataclasses import dataclass

import timm

from zoo.errors import InputError, near_misses


@dataclass(frozen=True)
class Released:
    """A file of weights.

    `file` is its name, empty where it is not known; `key` what their code evaluates of it, empty where that is not known; `url` a
    direct address or None, `page` where a person finds it; `licence` the SPDX name of the licence of the repository that offers it,
    None where there is none.
    """

    file: str
    key: str
    url: str | None
    page: str
    licence: str | None


_ONEDRIVE = "https://api.onedrive.com/v1.0/shares/{}/root/content"
_GOOGLE = "https://drive.google.com/file/d/{}/view"
_ATTNET = "https://unioulu-my.sharepoint.com/:f:/g/personal/hayu23_univ_yo_oulu_fi/EtaWTnsh1ytNgsIYetHHwt4B1RxG_HDHN70a3NOq3fustw"

# By model: the file, the key, and the page where there is no direct address.
_FILES: dict[str, tuple[str, str, str]] = {
    "biformer_tiny": ("biformer_tiny_best.pth", "model", _ONEDRIVE.format("s!AkBbczdRlZvChHEOoGkgwgQzEDlM")),
    "biformer_small": ("biformer_small_best.pth", "model", _ONEDRIVE.format("s!AkBbczdRlZvChHDyM-x9KWRBZ832")),
    "biformer_base": ("biformer_base_best.pth", "model", _ONEDRIVE.format("s!AkBbczdRlZvChHI_XPhoadjaNxtO")),
    "biformer_stl": ("biformer_stl_best.pth", "model", _ONEDRIVE.format("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1")),
    "biformer_stl_nchw": ("biformer_stl_nchw_best.pth", "model", _ONEDRIVE.format("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0")),
    "a2n_x2": ("aan_x2.pt", "", ""),
    "a2n_x3": ("aan_x3.pt", "", ""),
    **{f"han_x{scale}": (f"HAN_BIX{scale}.pt", "", "") for scale in (2, 3, 4, 8)},
    **{f"attnet_{size}": (f"AttNet_{size.upper()}.pth", "", _ATTNET) for size in ("xxs", "xs", "s", "t1", "t2", "t3", "t4")},
    "sk_resnet50": ("sk_resnet50.pth.tar", "state_dict", _GOOGLE.format("1DGYWPeKc7dyJ9i-zPJcPPa2engExPOnJ")),
    "sk_resnet101": ("sk_resnet101.pth.tar", "state_dict", _GOOGLE.format("1WB7HXx-cvUIxFRe-M61XZIzUN0a3nsbF")),
    **{f"litv2_{size}": (f"litv2_{size}.pth", "model", "") for size in ("s", "m", "b", "b_384")},
    "lambda_deit_tiny_024": ("tiny_024.pth", "model", _GOOGLE.format("188xpKUKUfG-ks5jH_yiGYmczknPBCqnV")),
    "lambda_deit_tiny_0246": ("tiny_0246.pth", "model", _GOOGLE.format("16HgVf_MgmEGXXek8F9Y1R__wsSxZAVYb")),
    "lambda_deit_small_024": ("small_024.pth", "model", _GOOGLE.format("1hAlrazQHPmoouxll_uNCvMnYCmfdLay4")),
    "lambda_deit_small_0246": ("small_0246.pth", "model", _GOOGLE.format("1F9rggdlcILbLz5UZr4fNxw_wuOdFLu50")),
    "lambda_deit_base_01346": ("base_01346.pth", "model", _GOOGLE.format("1kpN-yZKI2RAirD5GkG1tjyJMMyhwyZvC")),
    "lambda_deit_base_013469": ("base_013469.pth", "model", _GOOGLE.format("16MCFOl6MSpACtFZ-VnCesLPoD2051y-d")),
    **{f"moh_transnext_{size}": ("", "model", f"https://huggingface.co/Chat-UniVi/MoH-ViT-{page}")
       for size, page in (("small_80", "S-80"), ("small_75", "S-75"), ("base_75", "B-75"), ("base_50", "B-50"))},
    **{f"transnext_{size}": (f"transnext_{size}_224_1k.pth", "model", "") for size in ("micro", "tiny", "small", "base")},
    **{f"transnext_{size}_384": (f"transnext_{size}_384_1k_ft_1k.pth", "model", "") for size in ("small", "base")},
    "inspyrenet_swin_b": ("ckpt_fast.pth", "", ""),
    "inspyrenet_res2net50": ("latest.pth", "", "https://github.com/plemeri/InSPyReNet/blob/main/docs/model_zoo.md"),
    "vmamba_small_v0": ("vssmsmall_dp03_ckpt_epoch_238.pth", "model", ""),
    "sum": ("model.safetensors", "", "https://huggingface.co/safe-models/SUM"),
    "msinet": ("model_salicon_gpu.pb", "", "https://huggingface.co/alexanderkroner/MSI-Net"),
    "tap_fan_base_16_p4_hybrid": ("tapadl_fan_base.pth.tar", "state_dict", ""),
    "fan_tiny_12_p16_224": ("fan_vit_tiny.pth.tar", "state_dict", ""),
    "fan_small_12_p16_224": ("fan_vit_small.pth.tar", "state_dict", ""),
    "fan_base_18_p16_224": ("fan_vit_base.pth.tar", "state_dict", ""),
    "fan_tiny_8_p4_hybrid": ("fan_hybrid_tiny.pth.tar", "state_dict", ""),
    "fan_small_12_p4_hybrid": ("fan_hybrid_small.pth.tar", "state_dict", ""),
    "fan_base_16_p4_hybrid": ("fan_hybrid_base.pth.tar", "state_dict", ""),
}


def released(name: str) -> Released:
    """What the authors of the model `name` released. Raises InputError for an unknown model and where there is nothing."""
    if name not in _FILES:
        near = near_misses(name, _FILES)
        if name in timm.list_models():
            raise InputError(f"no weights of {name} were released that the zoo knows of; of these there are: {', '.join(_FILES)}")
        raise InputError(f"there is no model {name!r}{near or '; weights are known of ' + ', '.join(_FILES)}")
    file, key, page = _FILES[name]
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, name  # every model of the table is registered
    url = cfg.url if isinstance(cfg.url, str) and cfg.url else None
    return Released(file, key, url, page or str(cfg.origin_url), cfg.license)


def names() -> list[str]:
    """The models whose authors released weights."""
    return list(_FILES)
