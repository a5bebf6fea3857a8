"""Light networks with every kind of block once or twice: what traces, exports or compiles takes time for every operator."""
SHALLOW = {
    **{name: dict(depths=(1, 1, 1, 1)) for name in ("attnet_nano", "biformer_nano", "halonet_nano", "litv2_nano")},
    "moh_transnext_nano": dict(depths=(1, 0, 0, 1)),
    **{name: dict(depth=2) for name in ("deit_nano_patch16_224_cb", "ifam_nano_patch16_224", "tap_fan_nano", "vidat_nano_patch16_224")},
    "lambda_deit_nano_02": dict(depth=2, removed=(0,)), "a2n_nano_x2": dict(dim=8, depth=1, up_dim=4),
    "han_nano_x2": dict(dim=8, groups=2, depth=1), "vmamba_nano_v0": dict(dims=(24, 48), depths=(1, 1)),
    "sum_nano": dict(dims=(16, 32), depths=(1, 1), decoder_depths=(1, 1)),
    **{name: dict(widths=(4, 6, 8)) for name in ("attention_unet_nano", "attention_unet3d_nano")},
}
