_base_ = './upernet_litv2-s_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(name='litv2_b', args=dict(drop_path_rate=0.3)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
