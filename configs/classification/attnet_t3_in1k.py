_base_ = './attnet_t2_in1k.py'

model = dict(name='attnet_t3', args=dict(drop_path_rate=0.4))
train_dataloader = dict(batch_size=64)  # 64 GPUs
