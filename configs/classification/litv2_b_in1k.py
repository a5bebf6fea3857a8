_base_ = './litv2_s_in1k.py'

model = dict(name='litv2_b', args=dict(drop_path_rate=0.5))
