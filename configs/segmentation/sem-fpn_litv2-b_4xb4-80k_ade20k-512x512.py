_base_ = './sem-fpn_litv2-s_4xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(name='litv2_b', args=dict(drop_path_rate=0.3)),
    neck=dict(in_channels=[128, 256, 512, 1024]))
