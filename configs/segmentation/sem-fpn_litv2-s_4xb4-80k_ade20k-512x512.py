# The authors' settings: https://github.com/ziplab/LITv2, segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py
# (there with eight GPUs and two pictures each). Tools take their files as they are.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=litv2_s.pth, the authors' file.
_base_ = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='litv2_s', out_norm=True, norm_eps=1e-5,
        args=dict(drop_path_rate=0.2, attn_args=dict(mask_padding=False))),
    neck=dict(in_channels=[96, 192, 384, 768]))

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(decay_multipliers={}),  # of everything, norms and biases too
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type='PolyLR', eta_min=1e-6, power=0.9, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
