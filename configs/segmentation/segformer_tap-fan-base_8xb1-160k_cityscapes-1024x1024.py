# The toolbox's settings for SegFormer.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=tapadl_fan_base.pth.tar, the authors' file.
_base_ = 'mmseg::segformer/segformer_mit-b5_8xb1-160k_cityscapes-1024x1024.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='tap_fan_base_16_p4_hybrid', out_norm=True, args=dict(drop_path_rate=0.3)),
    decode_head=dict(in_channels=[128, 256, 448, 448]))

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, lr_multipliers={r'^decode_head\.': 10.0}))
