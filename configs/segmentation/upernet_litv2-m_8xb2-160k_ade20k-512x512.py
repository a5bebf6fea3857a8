_base_ = './upernet_litv2-s_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(name='litv2_m'))
