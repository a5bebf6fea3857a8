_base_ = './attnet_t2_in1k.py'

model = dict(name='attnet_t1', args=dict(drop_path_rate=0.1), mixup=dict(mixup_alpha=0.6))
optim_wrapper = dict(optimizer=dict(weight_decay=0.025))
train_dataloader = dict(dataset=dict(transform=dict(color_jitter=0.2, re_prob=0.15)))
