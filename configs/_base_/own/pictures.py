# Pictures, which samples.csv lists
_base_ = ['./schedule.py', './loaders.py', '../default_runtime.py']

data_root = 'work_dirs/own'  # holds the list

model = dict(type='Restorer', name='a2n_nano_x2')

pictures = dict(type='PictureFolderDataset', file='samples.csv', scale=2)

train_dataloader = dict(batch_size=16, dataset=dict(split='train', crop=48, crops=16, **pictures))
val_dataloader = dict(batch_size=1, dataset=dict(split='val', **pictures))
test_dataloader = val_dataloader

val_evaluator = dict(type='Restoration')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(weight_decay=0.0), clip_grad=None)  # pixels from 0 to 255 make large gradients

del pictures
