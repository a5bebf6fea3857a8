_base_ = './sem-fpn_litv2-s_4xb4-80k_ade20k-512x512.py'

model = dict(backbone=dict(name='litv2_m'))
