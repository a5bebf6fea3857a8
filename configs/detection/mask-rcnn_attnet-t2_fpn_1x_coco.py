# The usual 1x recipe with AdamW: the authors released none for detection (https://github.com/price112/Attentive-Convolution).
# Start from ImageNet: --cfg-options model.backbone.checkpoint=AttNet_T2.pth, the authors' file.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True, type='TimmBackbone', name='attnet_t2', out_norm=True, args=dict(drop_path_rate=0.2)),
    neck=dict(in_channels=[64, 128, 288, 512]))

optim_wrapper = dict(
    constructor='TimmOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=0.05))
