_base_ = './mask-rcnn_litv2-s_fpn_1x_coco.py'

model = dict(
    backbone=dict(name='litv2_b', args=dict(drop_path_rate=0.3), grad_checkpointing=True),
    neck=dict(in_channels=[128, 256, 512, 1024]))
