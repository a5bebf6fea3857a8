# The authors' settings: https://github.com/rayleizhu/BiFormer, object_detection/configs/coco/retinanet.1x.biformer_small.py
# Padding takes part in attention, as theirs does; model.backbone.args.attn_args.mask_padding=True leaves it out.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=biformer_small_best.pth, the authors' file.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='biformer_small', out_norm=True, norm_eval=True,
        args=dict(drop_path_rate=0.2, attn_args=dict(regions=16, mask_padding=False))),
    neck=dict(in_channels=[64, 128, 256, 512]))

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(decay_multipliers={}),  # of everything, norms and biases too
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4))
