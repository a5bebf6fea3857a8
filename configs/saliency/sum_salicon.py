# The authors' training (Arhosseini77/SUM, train.py), on SALICON alone: data_root holds train/images, train/maps, train/fixations and so on.
# It starts from VMamba: --cfg-options model.weights=vssmsmall_dp03_ckpt_epoch_238.pth, from https://github.com/MzeroMiko/VMamba.
_base_ = ['./msinet_salicon.py']

pictures = dict(size=(256, 256), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

model = dict(_delete_=True, type='FixationPredictor', name='sum', args=dict(drop_path_rate=0.3, condition=0), loss='combined')

train_dataloader = dict(batch_size=16, dataset=pictures)
val_dataloader = dict(dataset=pictures)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='StepLR', step_size=4, gamma=0.1)]
train_cfg = dict(max_epochs=30)
custom_hooks = [dict(type='EarlyStoppingHook', monitor='fixations/cc', rule='greater', patience=4)]

del pictures
