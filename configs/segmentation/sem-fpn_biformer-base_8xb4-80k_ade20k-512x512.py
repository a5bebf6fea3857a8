_base_ = './sem-fpn_biformer-small_8xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(name='biformer_base', args=dict(drop_path_rate=0.3)),
    neck=dict(in_channels=[96, 192, 384, 768]))
