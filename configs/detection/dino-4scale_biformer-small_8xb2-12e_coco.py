# DINO's settings for ResNet-50: the backbone learns at a tenth of the rate.
# Padding takes part in attention, as in BiFormer's own detectors (https://github.com/rayleizhu/BiFormer, object_detection); model.backbone.args.attn_args.mask_padding=True leaves it out.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=biformer_small_best.pth, the authors' file.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='biformer_small', out_indices=(1, 2, 3), out_norm=True, norm_eval=True,
        args=dict(drop_path_rate=0.2, attn_args=dict(regions=16, mask_padding=False))),
    neck=dict(in_channels=[128, 256, 512]))

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, lr_multipliers={r'^(stem|stages)\.': 0.1}))
