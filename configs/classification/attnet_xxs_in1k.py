_base_ = './attnet_t2_in1k.py'

model = dict(name='attnet_xxs', args=dict(drop_path_rate=0.0), mixup=dict(mixup_alpha=0.05))
optim_wrapper = dict(optimizer=dict(weight_decay=0.015))
train_dataloader = dict(batch_size=256, dataset=dict(transform=dict(auto_augment=None, color_jitter=0.0, re_prob=0.0)))  # 16 GPUs
