_base_ = './biformer_tiny_in1k.py'

model = dict(name='biformer_base', args=dict(drop_path_rate=0.4))
