# The toolbox's 1x recipe for ResNet-50: the paper's detectors, made with another toolbox, mix convolutions and attention.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=work_dirs/halonet_h2_256_in1k/epoch_300.pth, of our own training.
_base_ = './retinanet_das-resnet50_fpn_1x_coco.py'

model = dict(
    backbone=dict(name='halonet_h2_256'),
    neck=dict(in_channels=[80, 160, 320, 640]))
