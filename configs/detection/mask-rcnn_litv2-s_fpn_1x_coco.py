# The authors' settings: https://github.com/ziplab/LITv2, detection/configs/litv2/mask_rcnn_litv2_s_fpn_1x_coco.py
# Their models with windows of 4×4: --cfg-options model.backbone.args.windows="(None, None, 4, 1)". Tools take their files as they are.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=litv2_s.pth, the authors' file.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='litv2_s', out_norm=(1, 2, 3), norm_eps=1e-5,
        args=dict(drop_path_rate=0.2, attn_args=dict(mask_padding=False))),
    neck=dict(in_channels=[96, 192, 384, 768]))

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(decay_multipliers={r'norm': 0.0}),
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4))
