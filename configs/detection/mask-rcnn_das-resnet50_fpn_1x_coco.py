# The toolbox's 1x recipe for ResNet-50; the paper's own could not be read.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=work_dirs/das_resnet50_in1k/epoch_100.pth, of our own training.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(_delete_=True, type='TimmBackbone', name='das_resnet50', frozen_stages=2, norm_eval=True),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
