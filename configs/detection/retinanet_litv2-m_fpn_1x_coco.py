_base_ = './retinanet_litv2-s_fpn_1x_coco.py'

model = dict(backbone=dict(name='litv2_m'))
