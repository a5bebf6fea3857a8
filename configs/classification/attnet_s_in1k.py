_base_ = './attnet_t2_in1k.py'

model = dict(name='attnet_s', args=dict(drop_path_rate=0.05), mixup=dict(mixup_alpha=0.3))
optim_wrapper = dict(optimizer=dict(weight_decay=0.025))
train_dataloader = dict(dataset=dict(transform=dict(color_jitter=0.1, re_prob=0.0)))
