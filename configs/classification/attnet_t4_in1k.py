_base_ = './attnet_t2_in1k.py'

model = dict(name='attnet_t4', args=dict(drop_path_rate=0.5))
train_dataloader = dict(batch_size=32)  # 128 GPUs
