# The authors' settings: https://github.com/ziplab/LITv2, detection/configs/litv2/retinanet_litv2_s_fpn_1x_coco.py
# What they say of norms does not take effect (it is not under custom_keys): everything is decayed.
# Their models with windows of 4×4: --cfg-options model.backbone.args.windows="(None, None, 4, 1)". Tools take their files as they are.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=litv2_s.pth, the authors' file.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='litv2_s', out_norm=(1, 2, 3), norm_eps=1e-5,
        args=dict(drop_path_rate=0.2, attn_args=dict(mask_padding=False))),
    neck=dict(in_channels=[96, 192, 384, 768]))

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    paramwise_cfg=dict(decay_multipliers={}),
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4))
