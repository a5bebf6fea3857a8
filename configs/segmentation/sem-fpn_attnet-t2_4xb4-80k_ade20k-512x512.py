# The usual recipe with AdamW: the authors released none for segmentation (https://github.com/price112/Attentive-Convolution).
# Start from ImageNet: --cfg-options model.backbone.checkpoint=AttNet_T2.pth, the authors' file.
_base_ = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='attnet_t2', out_norm=True, args=dict(drop_path_rate=0.2)),
    neck=dict(in_channels=[64, 128, 288, 512]))

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type='PolyLR', eta_min=1e-6, power=0.9, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
