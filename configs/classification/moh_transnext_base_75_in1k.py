_base_ = './moh_transnext_small_75_in1k.py'

model = dict(name='moh_transnext_base_75', args=dict(drop_path_rate=0.6))
