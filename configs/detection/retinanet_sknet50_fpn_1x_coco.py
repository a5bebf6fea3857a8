# The toolbox's 1x recipe for ResNet-50.
# Start from ImageNet: --cfg-options model.backbone.checkpoint=work_dirs/sknet50_in1k/epoch_100.pth, of our own training.
_base_ = './retinanet_das-resnet50_fpn_1x_coco.py'

model = dict(backbone=dict(name='sknet50'))
