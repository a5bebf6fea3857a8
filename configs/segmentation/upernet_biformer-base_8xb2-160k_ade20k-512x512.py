_base_ = './upernet_biformer-small_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(name='biformer_base', args=dict(drop_path_rate=0.4)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
