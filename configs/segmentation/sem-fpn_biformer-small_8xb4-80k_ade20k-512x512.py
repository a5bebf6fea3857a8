# The authors' settings: https://github.com/rayleizhu/BiFormer, semantic_segmentation/configs/ade20k/sfpn.biformer_small.py
# They evaluate at sizes rounded up to multiples of 32; this does not.
# Padding takes part in attention, as theirs does; model.backbone.args.attn_args.mask_padding=True leaves it out.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=biformer_small_best.pth, the authors' file.
_base_ = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='biformer_small', out_norm=True,
        args=dict(drop_path_rate=0.15, attn_args=dict(regions=8, mask_padding=False))),
    neck=dict(in_channels=[64, 128, 256, 512]))

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(decay_multipliers={}),  # of everything, norms and biases too
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=1001),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-8, by_epoch=False, begin=0, end=80000, T_max=80000),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))

sync_bn = 'torch'  # of the backbone over all processes
